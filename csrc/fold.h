// The passes of a fold over (width, features), for layer inputs of one shape, on raw pointers: no
// framework header. csrc/README.md states the contract; eva_kernels/ops/fold.py is the caller.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>

#include "host_device.h"

namespace eva_kernels {

// One layer input. The caller fills a table of these as int64 rows.
struct FoldLayer {
  float* basis;           // (width, features), contiguous; overwritten by fold_rows
  const float* products;  // (width, features), contiguous
  float* saved;           // (num_saved, features), contiguous; may be null where num_saved is 0
  int64_t num_saved;      // leading rows of the basis that fold_rows copies to `saved`
  const double* shift;    // (features,), sum of (token - mean) over the step
  const double* square;   // (), sum of |token - mean|^2 over the step
  float* mean;            // (features,); overwritten by fold_rows
};
static_assert(sizeof(FoldLayer) == 7 * sizeof(int64_t), "the table is int64 (n, 7)");

// What the host knows of a layer before the fold; the squared singular values follow in memory.
struct FoldNumbers {
  double added;    // tokens of the step
  double share;    // added / count, where count includes them
  double ceiling;  // upper bound of the rank
  double weight;   // added^2 / count
};
constexpr int kFoldNumbers = 4;
static_assert(sizeof(FoldNumbers) == kFoldNumbers * sizeof(double), "the head of a row of numbers");

// In its basis a layer has C = diag(squares); its sums are about the old mean, and
// `delta = shift / added` is the mean of the step's tokens relative to it. The image of the basis
// is
//   Y = products + diag(squares) basis - along delta^T,  along = weight basis delta.
struct FoldArgs {
  const FoldLayer* layers;
  int64_t n_layers;
  int width;
  int64_t features;
  const double* numbers;  // (n_layers, kFoldNumbers + width), contiguous
  double* delta;          // (n_layers, features): fold_prepare writes it, the others read it
  double* along;          // (n_layers, width): fold_measure writes it, fold_rows reads it

  EVA_HOST_DEVICE const FoldNumbers& head(int64_t layer) const {
    return *reinterpret_cast<const FoldNumbers*>(numbers + layer * (kFoldNumbers + width));
  }
  EVA_HOST_DEVICE const double* squares(int64_t layer) const {
    return numbers + layer * (kFoldNumbers + width) + kFoldNumbers;
  }
};

struct FoldPrepareArgs {
  FoldArgs fold;
  float* mean;      // (n_layers, features), the new means
  double* scalars;  // (n_layers, kFoldScalars): square, gain of the total, norm of the new mean
};
constexpr int kFoldScalars = 3;

// The scalars of a layer: its sum of squares, how much that increases the total variance (at least
// 0; NaN stays NaN), and the norm of its new mean.
EVA_HOST_DEVICE inline void fold_scalars(double square, double correction, double norm,
                                         double* out) {
  const double gain = square - correction;
  out[0] = square;
  out[1] = gain < 0.0 ? 0.0 : gain;
  out[2] = sqrt(norm);
}

struct FoldMeasureArgs {
  FoldArgs fold;
  int64_t columns;  // features of a split, which one block sums over
  double* partial;  // partial sums, 2 * 64 * 64 numbers per block; unused on the CPU
  double* core;     // Y basis^T, (n_layers, width, width), bitwise symmetric
  double* metric;   // Y Y^T, the same
};

struct FoldRowsArgs {
  FoldArgs fold;
  const float* mean;      // from fold_prepare
  const double* mixing;   // (n_layers, width, width), contiguous: the new rows are mixing^T Y
  const double* summary;  // (n_layers, 2 + 2 width), the rank first: rows beyond it are not written
  const bool* all_finite;  // (): if false, nothing is written

  EVA_HOST_DEVICE int rank(int64_t layer) const {
    return static_cast<int>(summary[layer * (2 + 2 * fold.width)]);
  }
};

// Rows of a tile of core and metric. For a wider basis, all pairs of tiles in the lower triangle
// are computed.
constexpr int kFoldTile = 64;
constexpr int kFoldMaxWidth = 128;

EVA_HOST_DEVICE inline int fold_tiles(int width) { return (width + kFoldTile - 1) / kFoldTile; }

EVA_HOST_DEVICE inline int fold_pairs(int width) {
  const int tiles = fold_tiles(width);
  return tiles * (tiles + 1) / 2;
}

EVA_HOST_DEVICE inline int64_t fold_splits(int64_t features, int64_t columns) {
  return (features + columns - 1) / columns;
}

inline FoldArgs fold_args(uintptr_t layers, int64_t n_layers, int width, int64_t features,
                          uintptr_t numbers, uintptr_t delta, uintptr_t along) {
  return {reinterpret_cast<const FoldLayer*>(layers),
          n_layers,
          width,
          features,
          reinterpret_cast<const double*>(numbers),
          reinterpret_cast<double*>(delta),
          reinterpret_cast<double*>(along)};
}

inline FoldPrepareArgs fold_prepare_args(const FoldArgs& fold, uintptr_t mean, uintptr_t scalars) {
  return {fold, reinterpret_cast<float*>(mean), reinterpret_cast<double*>(scalars)};
}

inline FoldMeasureArgs fold_measure_args(const FoldArgs& fold, int64_t columns, uintptr_t partial,
                                         uintptr_t core, uintptr_t metric) {
  return {fold, columns, reinterpret_cast<double*>(partial), reinterpret_cast<double*>(core),
          reinterpret_cast<double*>(metric)};
}

inline FoldRowsArgs fold_rows_args(const FoldArgs& fold, uintptr_t mean, uintptr_t mixing,
                                   uintptr_t summary, uintptr_t all_finite) {
  return {fold, reinterpret_cast<const float*>(mean), reinterpret_cast<const double*>(mixing),
          reinterpret_cast<const double*>(summary), reinterpret_cast<const bool*>(all_finite)};
}

void fold_prepare_cpu(const FoldPrepareArgs& args);
void fold_measure_cpu(const FoldMeasureArgs& args);
void fold_rows_cpu(const FoldRowsArgs& args);

// Asynchronous on `stream` of `device`; throw std::runtime_error with CUDA's own message, or where
// the basis is wider than kFoldMaxWidth.
void fold_prepare_cuda(const FoldPrepareArgs& args, int device, uintptr_t stream);
void fold_measure_cuda(const FoldMeasureArgs& args, int device, uintptr_t stream);
void fold_rows_cuda(const FoldRowsArgs& args, int device, uintptr_t stream);

}  // namespace eva_kernels
