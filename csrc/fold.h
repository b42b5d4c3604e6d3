// The two passes of a fold over (width, features), for layer inputs of one shape, on raw pointers:
// no framework header. csrc/README.md states the contract; eva_kernels/ops/fold.py is the caller.
#pragma once

#include <cstddef>
#include <cstdint>

#include "host_device.h"

namespace eva_kernels {

// One layer input. The caller fills a table of these as int64 rows.
struct FoldLayer {
  float* basis;           // (width, features), contiguous; fold_rows puts the new one in its place
  const float* products;  // (width, features), contiguous
  float* before;          // (kept, features), contiguous; may be null where kept is 0
  int64_t kept;           // leading rows of the basis that fold_rows saves in `before`
};
static_assert(sizeof(FoldLayer) == 4 * sizeof(int64_t), "the table is int64 (n, 4)");

// A layer has C = diag(squares) in its basis, its sums about the mean before, and the shift
// `delta` of the mean by the step. The image of its basis is
//   Y = products + diag(squares) basis - along delta^T,  along = weight basis delta.
struct FoldArgs {
  const FoldLayer* layers;
  int64_t n_layers;
  int width;
  int64_t features;
  const double* delta;    // (n_layers, features), contiguous
  const double* numbers;  // rows of a layer: weight, then the squares (width,)
  int64_t numbers_stride;
  double* along;  // (n_layers, width): fold_measure writes it, fold_rows reads it

  EVA_HOST_DEVICE double weight(int64_t layer) const { return numbers[layer * numbers_stride]; }
  EVA_HOST_DEVICE const double* squares(int64_t layer) const {
    return numbers + layer * numbers_stride + 1;
  }
};

struct FoldMeasureArgs {
  FoldArgs fold;
  int64_t columns;  // of a split: features are added up in parts of so many
  double* partial;  // fold_partial_size numbers; the CPU has no use for it
  double* core;     // Y basis^T, (n_layers, width, width), symmetric to the bit
  double* metric;   // Y Y^T, the same
};

struct FoldRowsArgs {
  FoldArgs fold;
  const double* mixing;  // (n_layers, width, width), contiguous: the new rows are mixing^T Y
  const bool* sound;     // (): nothing is written where false
};

// Rows of a tile of core and metric. A wider basis has the pairs of its tiles in the lower
// triangle.
constexpr int kFoldTile = 64;
constexpr int kFoldMaxWidth = 128;

EVA_HOST_DEVICE inline int fold_pairs(int width) {
  const int tiles = (width + kFoldTile - 1) / kFoldTile;
  return tiles * (tiles + 1) / 2;
}

EVA_HOST_DEVICE inline int64_t fold_splits(int64_t features, int64_t columns) {
  return (features + columns - 1) / columns;
}

// Blocks of the kernel that measures; each leaves a tile of core and one of metric.
inline int64_t fold_blocks(const FoldMeasureArgs& args) {
  return args.fold.n_layers * fold_pairs(args.fold.width) *
         fold_splits(args.fold.features, args.columns);
}

inline FoldArgs fold_args(uintptr_t layers, int64_t n_layers, int width, int64_t features,
                          uintptr_t delta, uintptr_t numbers, int64_t numbers_stride,
                          uintptr_t along) {
  return {reinterpret_cast<const FoldLayer*>(layers),
          n_layers,
          width,
          features,
          reinterpret_cast<const double*>(delta),
          reinterpret_cast<const double*>(numbers),
          numbers_stride,
          reinterpret_cast<double*>(along)};
}

inline FoldMeasureArgs fold_measure_args(const FoldArgs& fold, int64_t columns, uintptr_t partial,
                                         uintptr_t core, uintptr_t metric) {
  return {fold, columns, reinterpret_cast<double*>(partial), reinterpret_cast<double*>(core),
          reinterpret_cast<double*>(metric)};
}

inline FoldRowsArgs fold_rows_args(const FoldArgs& fold, uintptr_t mixing, uintptr_t sound) {
  return {fold, reinterpret_cast<const double*>(mixing), reinterpret_cast<const bool*>(sound)};
}

void fold_measure_cpu(const FoldMeasureArgs& args);
void fold_rows_cpu(const FoldRowsArgs& args);

// Asynchronous on `stream` of `device`; throw std::runtime_error with CUDA's own message, or where
// the basis is wider than kFoldMaxWidth.
void fold_measure_cuda(const FoldMeasureArgs& args, int device, uintptr_t stream);
void fold_rows_cuda(const FoldRowsArgs& args, int device, uintptr_t stream);

}  // namespace eva_kernels
