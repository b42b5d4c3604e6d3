// Loads and stores of two or four consecutive numbers by one thread, as a vector where the address
// is aligned for it. Device code without a CUDA header: tests/emulator runs it on a CPU.
#pragma once

#include <cstdint>

namespace eva_kernels {

// out[i] = row[column + i], 0 beyond the end of a row of `columns`.
__device__ __forceinline__ void load_four(const float* row, int64_t column, int64_t columns,
                                          float (&out)[4]) {
  const float* from = row + column;
  if (column + 4 <= columns && reinterpret_cast<uintptr_t>(from) % sizeof(float4) == 0) {
    const float4 four = *reinterpret_cast<const float4*>(from);
    out[0] = four.x;
    out[1] = four.y;
    out[2] = four.z;
    out[3] = four.w;
    return;
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) out[i] = column + i < columns ? from[i] : 0.0f;
}

// row[column + i] = in[i], up to the end of a row of `columns`. Stored one number at a time, each
// sector of 32 bytes would take several stores of a warp.
__device__ __forceinline__ void store_four(float* row, int64_t column, int64_t columns,
                                           const float (&in)[4]) {
  float* to = row + column;
  if (column + 4 <= columns && reinterpret_cast<uintptr_t>(to) % sizeof(float4) == 0) {
    float4 four;
    four.x = in[0];
    four.y = in[1];
    four.z = in[2];
    four.w = in[3];
    *reinterpret_cast<float4*>(to) = four;
    return;
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if (column + i < columns) to[i] = in[i];
  }
}

// The same for two numbers.
__device__ __forceinline__ void store_two(float* row, int64_t column, int64_t columns, float first,
                                          float second) {
  float* to = row + column;
  if (column + 2 <= columns && reinterpret_cast<uintptr_t>(to) % sizeof(float2) == 0) {
    float2 two;
    two.x = first;
    two.y = second;
    *reinterpret_cast<float2*>(to) = two;
    return;
  }
  if (column < columns) to[0] = first;
  if (column + 1 < columns) to[1] = second;
}

// Store four consecutive numbers to shared memory; `to` is aligned to 16 bytes.
__device__ __forceinline__ void stage_four(double* to, const double (&in)[4]) {
#pragma unroll
  for (int i = 0; i < 4; i += 2) {
    double2 two;
    two.x = in[i];
    two.y = in[i + 1];
    *reinterpret_cast<double2*>(to + i) = two;
  }
}

}  // namespace eva_kernels
