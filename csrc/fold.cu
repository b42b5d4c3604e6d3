#include "fold.cuh"

#include <limits>

#include "cuda_utils.cuh"

namespace eva_kernels {
namespace {

unsigned grid_of(int64_t blocks) {
  if (blocks > std::numeric_limits<int>::max()) {
    throw std::runtime_error("eva_kernels: fold: more work than a CUDA grid has blocks");
  }
  return static_cast<unsigned>(blocks);
}

void check_width(int width) {
  if (width <= kFoldMaxWidth) return;
  throw std::runtime_error("eva_kernels: fold: width " + std::to_string(width) +
                           " is too large; the kernels take up to " +
                           std::to_string(kFoldMaxWidth));
}

bool is_empty(const FoldArgs& fold) {
  return fold.n_layers == 0 || fold.width == 0 || fold.features == 0;
}

}  // namespace

void fold_prepare_cuda(const FoldPrepareArgs& args, int device, uintptr_t stream) {
  const FoldArgs& fold = args.fold;
  if (is_empty(fold)) return;
  const DeviceGuard guard(device);
  fold_prepare_kernel<<<grid_of(fold.n_layers), kPrepareThreads, 0,
                        reinterpret_cast<cudaStream_t>(stream)>>>(args);
  cuda_check(cudaGetLastError(), "fold: launch of prepare");
}

void fold_measure_cuda(const FoldMeasureArgs& args, int device, uintptr_t stream) {
  const FoldArgs& fold = args.fold;
  check_width(fold.width);
  if (is_empty(fold)) return;
  const DeviceGuard guard(device);
  const auto cuda_stream = reinterpret_cast<cudaStream_t>(stream);
  constexpr int kRows = kAlongThreads / kLanes;
  const int64_t rows = fold.n_layers * fold.width;
  fold_along_kernel<<<grid_of((rows + kRows - 1) / kRows), kAlongThreads, 0, cuda_stream>>>(fold);
  cuda_check(cudaGetLastError(), "fold: launch of along");
  const int64_t splits = fold.n_layers * fold_splits(fold.features, args.columns);
  const int64_t equal = splits * measured_pairs<true>(fold.width);
  fold_measure_kernel<true><<<grid_of(equal), kMeasureThreads, 0, cuda_stream>>>(args);
  cuda_check(cudaGetLastError(), "fold: launch of measure");
  if (const int64_t others = splits * measured_pairs<false>(fold.width)) {
    fold_measure_kernel<false><<<grid_of(others), kMeasureThreads, 0, cuda_stream>>>(args);
    cuda_check(cudaGetLastError(), "fold: launch of measure below the diagonal");
  }
  const int64_t tiles = fold.n_layers * fold_pairs(fold.width);
  fold_reduce_kernel<<<grid_of(tiles * kReduceBlocks), kReduceThreads, 0, cuda_stream>>>(args);
  cuda_check(cudaGetLastError(), "fold: launch of reduce");
}

void fold_rows_cuda(const FoldRowsArgs& args, int device, uintptr_t stream) {
  const FoldArgs& fold = args.fold;
  check_width(fold.width);
  if (is_empty(fold)) return;
  const DeviceGuard guard(device);
  const int64_t blocks = (fold.features + kRowsColumns - 1) / kRowsColumns * fold.n_layers;
  fold_rows_kernel<<<grid_of(blocks), kRowsThreads, fold_rows_shared_bytes(fold.width),
                     reinterpret_cast<cudaStream_t>(stream)>>>(args);
  cuda_check(cudaGetLastError(), "fold: launch of rows");
}

}  // namespace eva_kernels
