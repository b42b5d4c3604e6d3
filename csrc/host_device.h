// Macros shared by host and device code.
#pragma once

// Marks functions that both call; empty for a host compiler.
#if defined(__CUDACC__)
#define EVA_HOST_DEVICE __host__ __device__
#else
#define EVA_HOST_DEVICE
#endif

// Dynamic shared memory, whose size is set at launch; the tests define their own.
#ifndef EVA_DYNAMIC_SHARED
#define EVA_DYNAMIC_SHARED(type, name) extern __shared__ __align__(16) type name[]
#endif
