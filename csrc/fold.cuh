// Device code of the fold. It includes no CUDA header, so that the tests can compile the same text
// with a host compiler (tests/emulator).
//
// Of all arrays of size (width, features) only the new rows are written to memory: Y is recomputed
// from basis and products wherever a block needs it. Products are by warps, see product.cuh.
//
//   prepare  a block per layer: delta, new mean, how much the step increases the total variance
//   along    a warp per row: weight * basis . delta
//   measure  a block takes a pair of row tiles of one layer and a split of its features. It stages
//            16 columns of Y and of the basis at a time; four warps accumulate Y basis^T and four
//            Y Y^T. Both are symmetric: only lower triangles are computed.
//   reduce   adds the splits in order and mirrors the lower triangle
//   rows     a block takes 32 columns of one layer, with all of their rows: no other block reads
//            these columns, so the new rows can overwrite the old ones
//
// Rows in shared memory are padded by 4 numbers to a length of 4 more than a multiple of 16: then
// the lanes of half a warp, which read a (4, 4) matrix, one number each, hit different banks.
#pragma once

#include "block.cuh"
#include "fold.h"
#include "product.cuh"
#include "vectors.cuh"

namespace eva_kernels {

constexpr int kPrepareThreads = 512;
constexpr int kAlongThreads = 256;
constexpr int kMeasureThreads = 256;
constexpr int kReduceThreads = 256;
constexpr int kRowsThreads = 128;
constexpr int kFoldDepth = 16;    // of a stage: columns in `measure`, old rows in `rows`
constexpr int kRowsColumns = 32;  // columns of a block of `rows`
constexpr int kPad = 4;           // of rows in shared memory
constexpr int kFoldTileSize = kFoldTile * kFoldTile;
constexpr int kReduceBlocks = kFoldTileSize / kReduceThreads;  // blocks per tile
constexpr int kTileRows = kFoldTile / kProductRows;            // products along a column of a tile
constexpr int kTileColumns = kFoldTile / kProductColumns;      // products along a row
constexpr int kRowsProducts = kRowsColumns / kProductColumns;
constexpr int kMixingPart = kFoldDepth * kFoldTile / kRowsThreads;
static_assert(kMeasureThreads == kFoldTile * kFoldDepth / 4, "a thread stages four numbers");
static_assert(kMeasureThreads / kLanes == 2 * kTileRows,
              "a warp per row of products, of core and of metric");
static_assert(kRowsThreads / kLanes == kTileRows, "a warp per row of products");

// Rows of Y that a block of `rows` holds: the width, rounded up to whole products.
EVA_HOST_DEVICE inline int fold_rows_depth(int width) {
  return (width + kProductDepth - 1) / kProductDepth * kProductDepth;
}

inline int fold_rows_shared_bytes(int width) {
  return static_cast<int>(sizeof(double)) * fold_rows_depth(width) * (kRowsColumns + kPad);
}

// What a thread needs to compute Y in one row of a layer.
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

// Four columns of a row, prefetched into registers.
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

// Y in four columns of a row, 0 beyond the last column.
__device__ __forceinline__ void image_of(const FoldRow& row, const FoldFour& four,
                                         const double* delta, int64_t column, int64_t columns,
                                         double (&out)[4]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    out[i] = 0.0;
    if (column + i >= columns) continue;
    out[i] = four.products[i] + four.basis[i] * row.square - row.along * delta[column + i];
  }
}

// Grid: layers.
__global__ void __launch_bounds__(kPrepareThreads) fold_prepare_kernel(FoldPrepareArgs args) {
  const FoldArgs& fold = args.fold;
  const FoldLayer& layer = fold.layers[blockIdx.x];
  const FoldNumbers& numbers = fold.head(blockIdx.x);
  const int64_t first = static_cast<int64_t>(blockIdx.x) * fold.features;
  double squared_delta = 0.0, norm = 0.0;
  for (int64_t d = threadIdx.x; d < fold.features; d += kPrepareThreads) {
    const double delta = layer.shift[d] / numbers.added;
    const float mean = static_cast<float>(layer.mean[d] + numbers.share * delta);
    fold.delta[first + d] = delta;
    args.mean[first + d] = mean;
    squared_delta += delta * delta;
    norm += static_cast<double>(mean) * mean;
  }
  squared_delta = over_block(squared_delta, Sum());
  norm = over_block(norm, Sum());
  if (threadIdx.x != 0) return;
  fold_scalars(*layer.square, numbers.weight * squared_delta, norm,
               args.scalars + blockIdx.x * kFoldScalars);
}

// Grid: the rows of all layers, 8 per block, one per warp.
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
  int rows;     // tile index along the rows of core and metric
  int columns;  // tile index along their columns, at most `rows`
};

__device__ __forceinline__ TilePair tile_pair(int pair) {
  int rows = 0;
  while (pair > rows) pair -= ++rows;
  return {rows, pair};
}

// Number of pairs of row tiles on the diagonal, or below it, where a warp holds more sums and the
// kernel is therefore another.
template <bool diagonal>
EVA_HOST_DEVICE int measured_pairs(int width) {
  return diagonal ? fold_tiles(width) : fold_tiles(width) - 1;
}
static_assert(kFoldMaxWidth == 2 * kFoldTile, "there is one pair below the diagonal");

// Position of a product in a tile, in units of products.
struct Place {
  int row;
  int column;
};

// The products of a tile that a warp accumulates: the first `row_products` are in row `row`
// from column `first` on, the rest in row `next_row` from column 0 on.
struct WarpPart {
  int row;
  int first;
  int row_products;
  int next_row;

  __device__ __forceinline__ Place at(int i) const {
    return i < row_products ? Place{row, first + i} : Place{next_row, i - row_products};
  }
};

// Products per warp. In a diagonal tile, 2, 4, 6 and 8 products of the four rows reach into the
// lower triangle: two warps share the first and the last row, two the rows between (5 each).
template <bool diagonal>
constexpr int kWarpProducts = diagonal ? 5 : kTileColumns;

// The part of warp `warp` of the four that share a tile.
template <bool diagonal>
__device__ __forceinline__ WarpPart warp_part(int warp) {
  if (!diagonal) return {warp, 0, kTileColumns, warp};
  const int below = kTileRows - 1 - warp / 2, above = warp / 2;
  if (warp % 2 == 0) return {below, 0, kWarpProducts<true>, below};
  return {below, kWarpProducts<true>, 2 * below + 2 - kWarpProducts<true>, above};
}

using StagedRow = double[kFoldDepth + kPad];

struct MeasureStage {
  alignas(16) StagedRow image_rows[kFoldTile];
  alignas(16) StagedRow image_columns[kFoldTile];
  alignas(16) StagedRow basis_columns[kFoldTile];
};

// sums += left right^T over the columns of a stage.
template <int count>
__device__ __forceinline__ void add_stage(const StagedRow* left, const StagedRow* right,
                                          const WarpPart& part, double (&sums)[count][4]) {
  const ProductLane lane = product_lane();
#pragma unroll 2
  for (int k = 0; k < kFoldDepth; k += kProductDepth) {
    double of_row[2], of_next[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int row = lane.group + kProductRows / 2 * i;
      of_row[i] = left[part.row * kProductRows + row][k + lane.within];
      of_next[i] = left[part.next_row * kProductRows + row][k + lane.within];
    }
#pragma unroll
    for (int n = 0; n < count; ++n) {
      const int column = part.at(n).column * kProductColumns + lane.group;
      const double of_column = right[column][k + lane.within];
      const bool in_row = n < part.row_products;
      const double of_left[2] = {in_row ? of_row[0] : of_next[0], in_row ? of_row[1] : of_next[1]};
      add_product(of_left, of_column, sums[n]);
    }
  }
}

// A warp's sums into a tile of 64 x 64.
template <int count>
__device__ __forceinline__ void store_sums(const WarpPart& part, const double (&sums)[count][4],
                                           double* tile) {
  const ProductLane lane = product_lane();
#pragma unroll
  for (int n = 0; n < count; ++n) {
    const Place place = part.at(n);
    for (int i = 0; i < 2; ++i) {
      const int row = place.row * kProductRows + kProductRows / 2 * i + lane.group;
      const int column = place.column * kProductColumns + 2 * lane.within;
      tile[row * kFoldTile + column] = sums[n][2 * i];
      tile[row * kFoldTile + column + 1] = sums[n][2 * i + 1];
    }
  }
}

// Grid: splits of the features, times measured_pairs, times layers. Every block writes its partial
// sums of a tile of core and of metric to `partial`.
template <bool diagonal>
__global__ void __launch_bounds__(kMeasureThreads, diagonal ? 2 : 1)
    fold_measure_kernel(FoldMeasureArgs args) {
  __shared__ MeasureStage stage;
  const FoldArgs& fold = args.fold;
  const int64_t splits = fold_splits(fold.features, args.columns);
  const int64_t split = blockIdx.x % splits;
  const int pairs = measured_pairs<diagonal>(fold.width);
  const int which = static_cast<int>(blockIdx.x / splits % pairs);
  const TilePair pair = diagonal ? TilePair{which, which} : TilePair{1, 0};
  const int64_t layer = blockIdx.x / splits / pairs;

  const int warp = threadIdx.x / kLanes;
  const bool of_core = warp < kTileRows;
  const WarpPart part = warp_part<diagonal>(warp % kTileRows);
  const StagedRow* right = of_core    ? stage.basis_columns
                           : diagonal ? stage.image_rows
                                      : stage.image_columns;
  const bool needed = part.next_row * kProductRows < fold.width - pair.rows * kFoldTile;

  // A thread stages four columns of one row in each tile.
  const int staged_row = threadIdx.x / (kFoldDepth / 4);
  const int first = threadIdx.x % (kFoldDepth / 4) * 4;
  const FoldRow row = fold_row(fold, layer, pair.rows * kFoldTile + staged_row);
  const FoldRow column = fold_row(fold, layer, pair.columns * kFoldTile + staged_row);
  const double* delta = fold.delta + layer * fold.features;
  const int64_t begin = split * args.columns;
  const int64_t end = begin + args.columns < fold.features ? begin + args.columns : fold.features;

  double sums[kWarpProducts<diagonal>][4] = {};
  FoldFour of_row, of_column;
  fetch(row, begin + first, end, of_row);
  if (!diagonal) fetch(column, begin + first, end, of_column);
  for (int64_t d = begin; d < end; d += kFoldDepth) {
    double four[4];
    image_of(row, of_row, delta, d + first, end, four);
    stage_four(&stage.image_rows[staged_row][first], four);
    if (!diagonal) {
      image_of(column, of_column, delta, d + first, end, four);
      stage_four(&stage.image_columns[staged_row][first], four);
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) four[i] = diagonal ? of_row.basis[i] : of_column.basis[i];
    stage_four(&stage.basis_columns[staged_row][first], four);
    __syncthreads();
    // Prefetch the next columns while these are multiplied.
    fetch(row, d + kFoldDepth + first, end, of_row);
    if (!diagonal) fetch(column, d + kFoldDepth + first, end, of_column);
    if (needed) add_stage(stage.image_rows, right, part, sums);
    __syncthreads();
  }
  const int64_t tile =
      layer * fold_pairs(fold.width) + pair.rows * (pair.rows + 1) / 2 + pair.columns;
  store_sums(part, sums, args.partial + kFoldTileSize * (2 * (tile * splits + split) + !of_core));
}

// Grid: blocks of kReduceThreads entries of a tile, times pairs of row tiles, times layers.
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

// Write Y in the block's columns to shared memory, 0 below the last row, and save the leading rows
// of the old basis.
__device__ __forceinline__ void stage_image(const FoldArgs& fold, int64_t layer, int64_t begin,
                                            double* image) {
  const FoldLayer& of = fold.layers[layer];
  const double* delta = fold.delta + layer * fold.features;
  const int first = threadIdx.x % (kRowsColumns / 4) * 4;
  constexpr int kRowsAtOnce = kRowsThreads / (kRowsColumns / 4);
  const int depth = fold_rows_depth(fold.width);
  for (int i = threadIdx.x / (kRowsColumns / 4); i < depth; i += kRowsAtOnce) {
    const FoldRow row = fold_row(fold, layer, i);
    FoldFour four;
    fetch(row, begin + first, fold.features, four);
    double staged[4];
    image_of(row, four, delta, begin + first, fold.features, staged);
    stage_four(image + i * (kRowsColumns + kPad) + first, staged);
    if (i < of.num_saved) {
      store_four(of.saved + i * fold.features, begin + first, fold.features, four.basis);
    }
  }
}

// Prefetch a thread's share of the mixing of kFoldDepth old rows into a tile of new rows; 0 beyond
// the width.
__device__ __forceinline__ void fetch_mixing(const double* mixing, int width, int old, int tile,
                                             double (&out)[kMixingPart]) {
#pragma unroll
  for (int i = 0; i < kMixingPart; ++i) {
    const int at = i * kRowsThreads + threadIdx.x;
    const int k = old + at / kFoldTile, row = tile + at % kFoldTile;
    out[i] = k < width && row < width ? mixing[k * width + row] : 0.0;
  }
}

// Store the new rows of a warp, within the rank and the features.
__device__ __forceinline__ void store_rows(const double (&sums)[kRowsProducts][4], int row,
                                           int rank, int64_t column, int64_t columns,
                                           float* basis) {
  const ProductLane lane = product_lane();
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int at = row + kProductRows / 2 * i + lane.group;
    if (at >= rank) continue;
#pragma unroll
    for (int n = 0; n < kRowsProducts; ++n) {
      store_two(basis + at * columns, column + kProductColumns * n + 2 * lane.within, columns,
                static_cast<float>(sums[n][2 * i]), static_cast<float>(sums[n][2 * i + 1]));
    }
  }
}

// Grid: blocks of 32 columns, times layers. Dynamic shared memory: fold_rows_shared_bytes(width).
__global__ void __launch_bounds__(kRowsThreads) fold_rows_kernel(FoldRowsArgs args) {
  __shared__ double mixing[kFoldDepth][kFoldTile + kPad];
  EVA_DYNAMIC_SHARED(double, image);
  if (!*args.all_finite) return;
  const FoldArgs& fold = args.fold;
  const int width = fold.width;
  const int64_t blocks = (fold.features + kRowsColumns - 1) / kRowsColumns;
  const int64_t layer = blockIdx.x / blocks;
  const int64_t begin = blockIdx.x % blocks * kRowsColumns;
  const double* of_layer = args.mixing + layer * width * width;
  double next[kMixingPart];
  fetch_mixing(of_layer, width, 0, 0, next);
  stage_image(fold, layer, begin, image);
  if (threadIdx.x < kRowsColumns && begin + threadIdx.x < fold.features) {
    const int64_t column = begin + threadIdx.x;
    fold.layers[layer].mean[column] = args.mean[layer * fold.features + column];
  }

  const ProductLane lane = product_lane();
  const int rank = args.rank(layer);
  const int of_warp = threadIdx.x / kLanes * kProductRows;
  for (int tile = 0; tile < width; tile += kFoldTile) {
    double sums[kRowsProducts][4] = {};
    for (int old = 0; old < width; old += kFoldDepth) {
      __syncthreads();  // the preceding stage has been read
#pragma unroll
      for (int i = 0; i < kMixingPart; ++i) {
        const int at = i * kRowsThreads + threadIdx.x;
        mixing[at / kFoldTile][at % kFoldTile] = next[i];
      }
      __syncthreads();  // in the first round also: the image is complete
      // Prefetch the next stage while this one is multiplied.
      const bool last = old + kFoldDepth >= width;
      fetch_mixing(of_layer, width, last ? 0 : old + kFoldDepth, last ? tile + kFoldTile : tile,
                   next);
      if (tile + of_warp >= rank) continue;  // these rows are not written
      const int depth = width - old < kFoldDepth ? width - old : kFoldDepth;
#pragma unroll 1  // avoids register spills
      for (int k = 0; k < depth; k += kProductDepth) {
        double left[2];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          left[i] = mixing[k + lane.within][of_warp + kProductRows / 2 * i + lane.group];
        }
        const double* right = image + (old + k + lane.within) * (kRowsColumns + kPad) + lane.group;
#pragma unroll
        for (int n = 0; n < kRowsProducts; ++n) {
          add_product(left, right[kProductColumns * n], sums[n]);
        }
      }
    }
    store_rows(sums, tile + of_warp, rank, begin, fold.features, fold.layers[layer].basis);
  }
}

}  // namespace eva_kernels
