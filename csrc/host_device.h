// EVA_HOST_DEVICE marks what both the host and the device call; empty to a host compiler.
#pragma once

#if defined(__CUDACC__)
#define EVA_HOST_DEVICE __host__ __device__
#else
#define EVA_HOST_DEVICE
#endif
