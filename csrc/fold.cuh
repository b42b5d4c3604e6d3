// Device code of the fold. It includes no CUDA header, so that the tests can compile the same text
// with a host compiler (tests/emulator).
//
// Measure and rows are bound by float64 arithmetic, and nothing of size (width, features) leaves
// the chip but the new rows: Y is formed from basis and products wherever a block needs it.
//
//   prepare  a block a layer: shift of the mean, new mean, what the step adds to the total variance
//   along    a warp a row:  weight * basis . delta
//   measure  a block takes a pair of row tiles of one layer and a split of its features. It stages
//            16 columns of Y and of the basis at a time, transposed, and each thread adds up a
//            4 x 4 part of Y basis^T and of Y Y^T. Both are symmetric: only lower parts are made.
//   reduce   adds the splits in order and mirrors the lower triangle
//   rows     a block takes 32 columns of one layer, all rows of them: it alone reads these columns,
//            so that it may write the new rows in place of the old
//
// A staged row of 64 numbers is kept in an order in which the 4 numbers of a thread are two pairs,
// 32 apart: threads that are neighbours then read neighbouring pairs, without a bank conflict.
#pragma once

#include "block.cuh"
#include "fold.h"

namespace eva_kernels {

constexpr int kPrepareThreads = 512;
constexpr int kAlongThreads = 256;
constexpr int kMeasureThreads = 256;
constexpr int kReduceThreads = 256;
constexpr int kRowsThreads = 128;
constexpr int kFoldDepth = 16;             // columns of a stage in measure, old rows in rows
constexpr int kRowsColumns = 32;           // columns of a block of rows
constexpr int kFoldPart = 4;               // a thread's part is 4 x 4
constexpr int kFoldPitch = kFoldTile + 2;  // between staged columns; even, for pairs
constexpr int kRowsPitch = kRowsColumns + 2;
constexpr int kFoldParts = kFoldTile / kFoldPart;
constexpr int kFoldTileSize = kFoldTile * kFoldTile;
constexpr int kReduceBlocks = kFoldTileSize / kReduceThreads;  // of a tile
static_assert(kMeasureThreads == kFoldParts * kFoldParts, "a part a thread");
static_assert(kMeasureThreads == kFoldTile * kFoldDepth / 4, "four numbers of a stage a thread");
static_assert(kRowsThreads == kFoldParts * kRowsColumns / kFoldPart, "a part a thread");

inline int fold_rows_shared_bytes(int width) {
  return static_cast<int>(sizeof(double)) * width * kRowsPitch;
}

// Where number i of a staged row of `size` is kept.
template <int size>
__device__ __forceinline__ int staged_at(int i) {
  return i / 4 * 2 + i % 2 + i % 4 / 2 * (size / 2);
}

// The four numbers of part `part` of a staged row.
template <int size>
__device__ __forceinline__ void read_part(const double* row, int part, double (&out)[kFoldPart]) {
  const double2 low = *reinterpret_cast<const double2*>(row + 2 * part);
  const double2 high = *reinterpret_cast<const double2*>(row + 2 * part + size / 2);
  out[0] = low.x;
  out[1] = low.y;
  out[2] = high.x;
  out[3] = high.y;
}

// out[i] = numbers `column`.. of a row of `columns`, 0 beyond its end.
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

// Numbers `column`.. of a row of `columns`, as far as it goes. One by one, the numbers of a warp's
// rows would fill each sector of 32 bytes in four stores.
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

// What a thread needs of one row of a layer to form Y.
struct FoldRow {
  const float* basis;  // null beyond the last row
  const float* products;
  double square;
  double along;
};

__device__ __forceinline__ FoldRow fold_row(const FoldArgs& args, int64_t layer, int row) {
  if (row >= args.width) return {nullptr, nullptr, 0.0, 0.0};
  const FoldLayer& of = args.layers[layer];
  return {of.basis + row * args.features, of.products + row * args.features,
          args.squares(layer)[row], args.along[layer * args.width + row]};
}

// Four columns of a row in flight.
struct FoldFour {
  float basis[4];
  float products[4];
};

__device__ __forceinline__ void fetch(const FoldRow& row, int64_t column, int64_t columns,
                                      FoldFour& four) {
  if (row.basis == nullptr) {
    four = {};
    return;
  }
  load_four(row.basis, column, columns, four.basis);
  load_four(row.products, column, columns, four.products);
}

__device__ __forceinline__ double image_at(const FoldRow& row, const FoldFour& four, int i,
                                           const double* delta, int64_t column, int64_t columns) {
  if (column + i >= columns) return 0.0;
  return four.products[i] + four.basis[i] * row.square - row.along * delta[column + i];
}

// Grid: layers.
__global__ void __launch_bounds__(kPrepareThreads) fold_prepare_kernel(FoldPrepareArgs args) {
  const FoldArgs& fold = args.fold;
  const FoldLayer& layer = fold.layers[blockIdx.x];
  const FoldNumbers& numbers = fold.head(blockIdx.x);
  const int64_t first = static_cast<int64_t>(blockIdx.x) * fold.features;
  double away = 0.0, norm = 0.0;
  for (int64_t d = threadIdx.x; d < fold.features; d += kPrepareThreads) {
    const double delta = layer.shift[d] / numbers.added;
    const float mean = static_cast<float>(layer.mean[d] + numbers.share * delta);
    fold.delta[first + d] = delta;
    args.mean[first + d] = mean;
    away += delta * delta;
    norm += static_cast<double>(mean) * mean;
  }
  away = over_block(away, Sum());
  norm = over_block(norm, Sum());
  if (threadIdx.x != 0) return;
  fold_scalars(*layer.square, numbers.weight * away, norm,
               args.scalars + blockIdx.x * kFoldScalars);
}

// Grid: blocks of 8 rows of all rows of all layers, a warp each.
__global__ void __launch_bounds__(kAlongThreads) fold_along_kernel(FoldArgs args) {
  const int64_t row =
      static_cast<int64_t>(blockIdx.x) * (kAlongThreads / kLanes) + threadIdx.x / kLanes;
  if (row >= args.n_layers * args.width) return;  // a whole warp
  const int64_t layer = row / args.width;
  const float* basis = args.layers[layer].basis + row % args.width * args.features;
  const double* delta = args.delta + layer * args.features;
  double sum = 0.0;
  for (int64_t d = threadIdx.x % kLanes * 4; d < args.features; d += kLanes * 4) {
    float four[4];
    load_four(basis, d, args.features, four);
    for (int i = 0; i < 4 && d + i < args.features; ++i) sum += four[i] * delta[d + i];
  }
  for (int offset = kLanes / 2; offset > 0; offset /= 2) {
    sum += __shfl_down_sync(0xffffffffu, sum, offset);
  }
  if (threadIdx.x % kLanes == 0) args.along[row] = args.head(layer).weight * sum;
}

struct TilePair {
  int rows;     // index of the tile of the rows of core and metric
  int columns;  // at most `rows`
};

__device__ __forceinline__ TilePair tile_pair(int pair) {
  int rows = 0;
  while (pair > rows) pair -= ++rows;
  return {rows, pair};
}

// The part of a tile that a thread makes; on the diagonal the first 136 threads make the lower
// triangle of parts, and the others only load.
struct TilePart {
  int row;
  int column;
  bool needed;
};

__device__ __forceinline__ TilePart tile_part(bool diagonal) {
  const int i = threadIdx.x;
  if (!diagonal) return {i / kFoldParts, i % kFoldParts, true};
  int row = 0, rest = i;
  while (rest > row && row < kFoldParts) rest -= ++row;
  return row < kFoldParts ? TilePart{row, rest, true} : TilePart{0, 0, false};
}

struct MeasureStage {
  double image_rows[kFoldDepth][kFoldPitch];
  double image_columns[kFoldDepth][kFoldPitch];
  double basis_columns[kFoldDepth][kFoldPitch];
};

// core += Y_rows basis_columns^T, metric += Y_rows Y_columns^T over the columns of a stage.
__device__ __forceinline__ void add_stage(const MeasureStage& stage, const TilePart& part,
                                          bool diagonal, double (&core)[kFoldPart][kFoldPart],
                                          double (&metric)[kFoldPart][kFoldPart]) {
#pragma unroll 1  // registers for two blocks on a multiprocessor
  for (int k = 0; k < kFoldDepth; ++k) {
    double left[kFoldPart], image[kFoldPart], basis[kFoldPart];
    read_part<kFoldTile>(stage.image_rows[k], part.row, left);
    read_part<kFoldTile>(diagonal ? stage.image_rows[k] : stage.image_columns[k], part.column,
                         image);
    read_part<kFoldTile>(stage.basis_columns[k], part.column, basis);
#pragma unroll
    for (int i = 0; i < kFoldPart; ++i) {
#pragma unroll
      for (int j = 0; j < kFoldPart; ++j) {
        core[i][j] += left[i] * basis[j];
        metric[i][j] += left[i] * image[j];
      }
    }
  }
}

// Grid: splits of the features, by pairs of row tiles, by layers. Every block writes its tile of
// core and of metric to `partial`.
__global__ void __launch_bounds__(kMeasureThreads, 2) fold_measure_kernel(FoldMeasureArgs args) {
  __shared__ MeasureStage stage;
  const FoldArgs& fold = args.fold;
  const int64_t splits = fold_splits(fold.features, args.columns);
  const int64_t split = blockIdx.x % splits;
  const int64_t tile = blockIdx.x / splits;
  const int pairs = fold_pairs(fold.width);
  const TilePair pair = tile_pair(static_cast<int>(tile % pairs));
  const int64_t layer = tile / pairs;
  const bool diagonal = pair.rows == pair.columns;
  const TilePart part = tile_part(diagonal);

  // A thread stages four columns of one row, of either tile.
  const int staged_row = threadIdx.x / (kFoldDepth / 4);
  const int first = threadIdx.x % (kFoldDepth / 4) * 4;
  const int at = staged_at<kFoldTile>(staged_row);
  const FoldRow row = fold_row(fold, layer, pair.rows * kFoldTile + staged_row);
  const FoldRow column = fold_row(fold, layer, pair.columns * kFoldTile + staged_row);
  const double* delta = fold.delta + layer * fold.features;
  const int64_t begin = split * args.columns;
  const int64_t end = begin + args.columns < fold.features ? begin + args.columns : fold.features;

  double core[kFoldPart][kFoldPart] = {};
  double metric[kFoldPart][kFoldPart] = {};
  FoldFour of_row, of_column;
  fetch(row, begin + first, end, of_row);
  if (!diagonal) fetch(column, begin + first, end, of_column);
  for (int64_t d = begin; d < end; d += kFoldDepth) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      stage.image_rows[first + i][at] = image_at(row, of_row, i, delta, d + first, end);
      stage.basis_columns[first + i][at] = diagonal ? of_row.basis[i] : of_column.basis[i];
      if (diagonal) continue;
      stage.image_columns[first + i][at] = image_at(column, of_column, i, delta, d + first, end);
    }
    __syncthreads();
    // The next columns are on their way while these are multiplied.
    fetch(row, d + kFoldDepth + first, end, of_row);
    if (!diagonal) fetch(column, d + kFoldDepth + first, end, of_column);
    if (part.needed) add_stage(stage, part, diagonal, core, metric);
    __syncthreads();
  }
  if (!part.needed) return;
  double* out = args.partial + 2 * kFoldTileSize * static_cast<int64_t>(blockIdx.x);
  for (int i = 0; i < kFoldPart; ++i) {
    for (int j = 0; j < kFoldPart; ++j) {
      const int entry = (part.row * kFoldPart + i) * kFoldTile + part.column * kFoldPart + j;
      out[entry] = core[i][j];
      out[kFoldTileSize + entry] = metric[i][j];
    }
  }
}

// Grid: blocks of kReduceThreads entries of a tile, by pairs of row tiles, by layers.
__global__ void __launch_bounds__(kReduceThreads) fold_reduce_kernel(FoldMeasureArgs args) {
  const int width = args.fold.width;
  const int64_t splits = fold_splits(args.fold.features, args.columns);
  const int pairs = fold_pairs(width);
  const int64_t tile = blockIdx.x / kReduceBlocks;
  const int entry = static_cast<int>(blockIdx.x % kReduceBlocks) * kReduceThreads + threadIdx.x;
  const int64_t layer = tile / pairs;
  const TilePair pair = tile_pair(static_cast<int>(tile % pairs));
  const double* partial = args.partial + 2 * kFoldTileSize * splits * tile;
  const int row = pair.rows * kFoldTile + entry / kFoldTile;
  const int column = pair.columns * kFoldTile + entry % kFoldTile;
  if (row >= width || column > row) return;
  double core = 0.0, metric = 0.0;
#pragma unroll 8
  for (int64_t split = 0; split < splits; ++split) {
    core += partial[2 * kFoldTileSize * split + entry];
    metric += partial[2 * kFoldTileSize * split + kFoldTileSize + entry];
  }
  const int64_t lower = (layer * width + row) * width + column;
  const int64_t upper = (layer * width + column) * width + row;
  args.core[lower] = args.core[upper] = core;
  args.metric[lower] = args.metric[upper] = metric;
}

// Put Y of the block's columns into shared memory, (width, kRowsPitch), and save the leading rows.
__device__ __forceinline__ void stage_image(const FoldArgs& fold, int64_t layer, int64_t begin,
                                            double* image) {
  const FoldLayer& of = fold.layers[layer];
  const double* delta = fold.delta + layer * fold.features;
  const int first = threadIdx.x % (kRowsColumns / 4) * 4;
  constexpr int kRowsAtOnce = kRowsThreads / (kRowsColumns / 4);
  for (int i = threadIdx.x / (kRowsColumns / 4); i < fold.width; i += kRowsAtOnce) {
    const FoldRow row = fold_row(fold, layer, i);
    FoldFour four;
    fetch(row, begin + first, fold.features, four);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      image[i * kRowsPitch + staged_at<kRowsColumns>(first + j)] =
          image_at(row, four, j, delta, begin + first, fold.features);
    }
    if (i < of.kept) {
      store_four(of.before + i * fold.features, begin + first, fold.features, four.basis);
    }
  }
}

// Grid: blocks of 32 columns, by layers. Dynamic shared memory: fold_rows_shared_bytes(width).
__global__ void __launch_bounds__(kRowsThreads) fold_rows_kernel(FoldRowsArgs args) {
  __shared__ double mixing[kFoldDepth][kFoldPitch];
  EVA_DYNAMIC_SHARED(double, image);
  if (!*args.sound) return;
  const FoldArgs& fold = args.fold;
  const int width = fold.width;
  const int64_t blocks = (fold.features + kRowsColumns - 1) / kRowsColumns;
  const int64_t layer = blockIdx.x / blocks;
  const int64_t begin = blockIdx.x % blocks * kRowsColumns;
  const double* of_layer = args.mixing + layer * width * width;
  const int rank = args.rank(layer);
  stage_image(fold, layer, begin, image);
  if (threadIdx.x < kRowsColumns && begin + threadIdx.x < fold.features) {
    const int64_t column = begin + threadIdx.x;
    fold.layers[layer].mean[column] = args.mean[layer * fold.features + column];
  }

  const int part_row = threadIdx.x / (kRowsColumns / kFoldPart);
  const int part_column = threadIdx.x % (kRowsColumns / kFoldPart);
  for (int tile = 0; tile < width; tile += kFoldTile) {
    double sum[kFoldPart][kFoldPart] = {};
    for (int old = 0; old < width; old += kFoldDepth) {
      __syncthreads();  // the stage before has been read, and once: the image is there
      for (int i = threadIdx.x; i < kFoldDepth * kFoldTile; i += kRowsThreads) {
        const int k = i / kFoldTile, row = i % kFoldTile;
        const bool inside = old + k < width && tile + row < width;
        mixing[k][staged_at<kFoldTile>(row)] =
            inside ? of_layer[(old + k) * width + tile + row] : 0.0;
      }
      __syncthreads();
      const int depth = width - old < kFoldDepth ? width - old : kFoldDepth;
#pragma unroll 4
      for (int k = 0; k < depth; ++k) {
        double left[kFoldPart], right[kFoldPart];
        read_part<kFoldTile>(mixing[k], part_row, left);
        read_part<kRowsColumns>(image + (old + k) * kRowsPitch, part_column, right);
#pragma unroll
        for (int i = 0; i < kFoldPart; ++i) {
#pragma unroll
          for (int j = 0; j < kFoldPart; ++j) sum[i][j] += left[i] * right[j];
        }
      }
    }
    for (int i = 0; i < kFoldPart; ++i) {
      const int row = tile + part_row * kFoldPart + i;
      if (row >= rank) break;
      float rounded[kFoldPart];
#pragma unroll
      for (int j = 0; j < kFoldPart; ++j) rounded[j] = static_cast<float>(sum[i][j]);
      store_four(fold.layers[layer].basis + row * fold.features, begin + part_column * kFoldPart,
                 fold.features, rounded);
    }
  }
}

}  // namespace eva_kernels
