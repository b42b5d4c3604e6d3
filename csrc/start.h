// The first basis of a layer input, from the sums of its first tokens about their mean, on raw
// pointers: no framework header. csrc/README.md states the contract; eva_kernels/ops/start.py is
// the caller.
//
// It is two folds of one layer input (see fold.h) without a host decision in between. Each fold is
// several launches; made as single calls from Python they would take longer than the device needs.
#pragma once

#include <cstddef>
#include <cstdint>
#include <initializer_list>

#include "fold.h"
#include "nystrom.h"

namespace eva_kernels {

// The sums of the first tokens; cleared after use.
struct StartSums {
  float* products;
  double* shift;
  double* square;
};

struct StartArgs {
  FoldLayer layer;  // with a random basis; num_saved = 0, no old rows are saved
  StartSums sums;   // the same sums as in `layer`, writable
  int width;
  int64_t features;
  double tokens;    // number of tokens in the sums
  int64_t columns;  // see FoldMeasureArgs
  char* workspace;  // start_bytes(...) bytes, aligned as an allocation is
};

// The parts of the workspace: all arrays that a caller provides for the folds of a step.
struct StartParts {
  FoldLayer* layers;
  double* numbers;  // of both folds
  double* delta;
  double* along;
  double* scalars;
  double* partial;
  double* core;
  double* metric;
  double* scratch;
  double* mixing;
  double* summary;
  float* mean;
  bool* all_finite;
  size_t bytes;
};

inline StartParts start_parts(char* workspace, int width, int64_t features, int64_t columns) {
  const size_t square = static_cast<size_t>(width) * width;
  const size_t count = static_cast<size_t>(features);
  const auto blocks = static_cast<size_t>(fold_pairs(width) * fold_splits(features, columns));
  size_t used = 0;
  const auto take = [&](size_t bytes) {
    char* part = workspace + used;
    used += (bytes + 15) / 16 * 16;
    return part;
  };
  const auto doubles = [&](size_t n) {
    return reinterpret_cast<double*>(take(n * sizeof(double)));
  };
  StartParts parts{};
  parts.layers = reinterpret_cast<FoldLayer*>(take(sizeof(FoldLayer)));
  parts.numbers = doubles(2 * static_cast<size_t>(kFoldNumbers + width));
  parts.delta = doubles(count);
  parts.along = doubles(static_cast<size_t>(width));
  parts.scalars = doubles(kFoldScalars);
  parts.partial = doubles(blocks * 2 * kFoldTile * kFoldTile);
  parts.core = doubles(square);
  parts.metric = doubles(square);
  parts.scratch = doubles(kNystromScratch * square);
  parts.mixing = doubles(square);
  parts.summary = doubles(static_cast<size_t>(nystrom_summary_size(width)));
  parts.mean = reinterpret_cast<float*>(take(count * sizeof(float)));
  parts.all_finite = reinterpret_cast<bool*>(take(sizeof(bool)));
  parts.bytes = used;
  return parts;
}

// Entry i of `numbers` of both folds. The first folds the tokens into an empty state. The second
// folds one token equal to the mean, with C = V^T V, so that the image is the basis itself.
EVA_HOST_DEVICE inline double start_number(int i, int width, double tokens) {
  if (i >= kFoldNumbers + width) return 1.0;
  const double head[kFoldNumbers] = {tokens, 1.0, tokens - 1.0, tokens};
  return i < kFoldNumbers ? head[i] : 0.0;
}

// Only the span of a first basis matters. So its rows are those of the image, whitened twice: first
// by their products with the random basis, which gives rows of C^(1/2), then by their own Gram
// matrix, which makes them orthonormal.
template <class Device>
void run_start(const StartArgs& args, const Device& device) {
  const StartParts parts = start_parts(args.workspace, args.width, args.features, args.columns);
  device.set_up(args, parts);
  FoldArgs fold{parts.layers,  1,           args.width, args.features,
                parts.numbers, parts.delta, parts.along};
  device.prepare({fold, parts.mean, parts.scalars});
  for (const int goal : {kNystromWhiten, kNystromOrthogonal}) {
    device.measure({fold, args.columns, parts.partial, parts.core, parts.metric});
    device.decompose({parts.core, parts.core, &fold.head(0).ceiling, nullptr, 1, args.width, 0.0,
                      goal, parts.scratch, parts.mixing, parts.summary});
    device.rows({fold, parts.mean, parts.mixing, parts.summary, parts.all_finite});
    if (goal == kNystromOrthogonal) break;
    device.clear(args, parts);
    fold.numbers += kFoldNumbers + args.width;
  }
}

inline StartArgs start_args(uintptr_t basis, uintptr_t products, uintptr_t shift, uintptr_t square,
                            uintptr_t mean, int width, int64_t features, double tokens,
                            int64_t columns, uintptr_t workspace) {
  const StartSums sums{reinterpret_cast<float*>(products), reinterpret_cast<double*>(shift),
                       reinterpret_cast<double*>(square)};
  const FoldLayer layer{
      reinterpret_cast<float*>(basis), sums.products, nullptr, 0, sums.shift, sums.square,
      reinterpret_cast<float*>(mean)};
  return {layer, sums, width, features, tokens, columns, reinterpret_cast<char*>(workspace)};
}

inline size_t start_bytes(int width, int64_t features, int64_t columns) {
  return start_parts(nullptr, width, features, columns).bytes;
}

void start_cpu(const StartArgs& args);

// Asynchronous on `stream` of `device`; throws as fold_measure_cuda and nystrom_cuda do.
void start_cuda(const StartArgs& args, int device, uintptr_t stream);

}  // namespace eva_kernels
