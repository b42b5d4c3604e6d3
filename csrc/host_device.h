// What host and device code share.
#pragma once

// Marks what both call; empty to a host compiler.
#if defined(__CUDACC__)
#define EVA_HOST_DEVICE __host__ __device__
#else
#define EVA_HOST_DEVICE
#endif

// Memory of a block whose size the launch gives; the tests put their own in its place.
#ifndef EVA_DYNAMIC_SHARED
#define EVA_DYNAMIC_SHARED(type, name) extern __shared__ __align__(16) type name[]
#endif
