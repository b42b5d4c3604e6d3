// Runs the device code of the fold under several schedules and compares it with the code for the
// CPU; all schedules must give the same bits. Exit code 0 if all agree; otherwise 1 and the first
// difference. The argument "small" skips widths that take long.
#include <cmath>
#include <cstdio>
#include <limits>

#include "cuda_emulator.h"
// after the emulator, which replaces the CUDA headers
#include "fold.cpp"
#include "fold.cuh"

namespace {

using namespace eva_kernels;
using Doubles = std::vector<double>;
using Floats = std::vector<float>;

constexpr double kNan = std::numeric_limits<double>::quiet_NaN();
struct Shape {
  int layers, width;
  int64_t features, columns;
  int shift = 0;  // elements before a matrix, NaN: moves the alignment
};

void require(bool holds, const std::string& what) {
  if (!holds) throw std::runtime_error(what);
}

// Inputs and results of a fold. Buffers have the exact size, so that AddressSanitizer detects a
// read past their end.
struct Fold {
  Shape shape;
  std::vector<Floats> bases{}, products{}, before{}, means{};
  std::vector<Doubles> shifts{};
  Floats mean{};
  Doubles squares{}, scalars{}, delta{}, numbers{}, along{}, core{}, metric{}, mixing{}, summary{};
  std::vector<FoldLayer> table{};

  explicit Fold(const Shape& s) : shape(s) {
    std::mt19937 random(s.width + s.features);
    std::normal_distribution<float> normal;
    const size_t size = s.width * s.features, square = s.layers * s.width * s.width;
    const auto fill = [&](Floats& matrix) {
      matrix.assign(s.shift + size, static_cast<float>(kNan));
      for (size_t i = 0; i < size; ++i) matrix[s.shift + i] = normal(random);
    };
    bases.resize(s.layers);
    products.resize(s.layers);
    before.resize(s.layers);
    for (int i = 0; i < s.layers; ++i) {
      fill(bases[i]);
      fill(products[i]);
      before[i].assign(kept(i) * s.features, static_cast<float>(kNan));
    }
    for (int i = 0; i < s.layers; ++i) {
      means.emplace_back(s.features);
      shifts.emplace_back(s.features);
      for (float& x : means[i]) x = normal(random);
      for (double& x : shifts[i]) x = normal(random);
      // In the last layer nearly all squares lie about the mean, in the first none.
      squares.push_back(i == 0 ? 0.0 : 1e6);
    }
    delta.assign(s.layers * s.features, kNan);
    mean.assign(s.layers * s.features, static_cast<float>(kNan));
    scalars.assign(s.layers * kFoldScalars, kNan);
    mixing.resize(square);
    for (double& x : mixing) x = normal(random);
    summary.assign(s.layers * (2 + 2 * s.width), kNan);
    for (int i = 0; i < s.layers; ++i) {  // the last layer has full rank
      summary[i * (2 + 2 * s.width)] = i == s.layers - 1 ? s.width : s.width / 2;
    }
    numbers.resize(s.layers * (kFoldNumbers + s.width));
    for (double& x : numbers) x = 0.5 + std::fabs(normal(random));
    along.assign(s.layers * s.width, kNan);
    core.assign(square, kNan);
    metric.assign(square, kNan);
  }

  // Saved rows: all of the last layer, none of the first, half of the others.
  int64_t kept(int layer) const {
    if (layer == shape.layers - 1) return shape.width;
    return layer == 0 ? 0 : shape.width / 2;
  }

  FoldArgs args() {
    table.clear();
    for (int i = 0; i < shape.layers; ++i) {
      float* saved = before[i].empty() ? nullptr : before[i].data();
      table.push_back({bases[i].data() + shape.shift, products[i].data() + shape.shift, saved,
                       kept(i), shifts[i].data(), &squares[i], means[i].data()});
    }
    return {table.data(),   shape.layers, shape.width, shape.features,
            numbers.data(), delta.data(), along.data()};
  }
};

template <class Vector>
void compare(const Vector& found, const Vector& expected, double tolerance,
             const std::string& what) {
  double scale = 1.0;
  for (const auto x : expected) {
    if (std::isfinite(x)) scale = std::max(scale, std::fabs(static_cast<double>(x)));
  }
  for (size_t i = 0; i < expected.size(); ++i) {
    const bool both = std::isnan(found[i]) && std::isnan(expected[i]);
    require(both || std::fabs(static_cast<double>(found[i]) - expected[i]) <= tolerance * scale,
            what + " " + std::to_string(i) + ": " + std::to_string(found[i]) + ", expected " +
                std::to_string(expected[i]));
  }
}

// Compares bits, so that NaN equals itself.
template <class Vector>
bool identical(const Vector& a, const Vector& b) {
  return a.size() == b.size() &&
         (a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(a[0])) == 0);
}

void run_on_device(Fold& fold, bool all_finite, unsigned seed) {
  const FoldArgs args = fold.args();
  FoldMeasureArgs measure{args, fold.shape.columns, nullptr, fold.core.data(), fold.metric.data()};
  const int64_t splits = args.n_layers * fold_splits(args.features, measure.columns);
  Doubles partial(2 * kFoldTileSize * splits * fold_pairs(args.width), kNan);
  measure.partial = partial.data();
  emulator::launch<FoldPrepareArgs>(fold_prepare_kernel, fold.shape.layers, kPrepareThreads,
                                    {args, fold.mean.data(), fold.scalars.data()}, seed);
  constexpr int kRows = kAlongThreads / kLanes;
  const int rows = fold.shape.layers * fold.shape.width;
  emulator::launch<FoldArgs>(fold_along_kernel, (rows + kRows - 1) / kRows, kAlongThreads, args,
                             seed);
  emulator::launch<FoldMeasureArgs>(fold_measure_kernel<true>,
                                    splits * measured_pairs<true>(args.width), kMeasureThreads,
                                    measure, seed);
  emulator::launch<FoldMeasureArgs>(fold_measure_kernel<false>,
                                    splits * measured_pairs<false>(args.width), kMeasureThreads,
                                    measure, seed);
  emulator::launch<FoldMeasureArgs>(
      fold_reduce_kernel, fold.shape.layers * fold_pairs(fold.shape.width) * kReduceBlocks,
      kReduceThreads, measure, seed);
  const int64_t blocks = (fold.shape.features + kRowsColumns - 1) / kRowsColumns;
  emulator::launch<FoldRowsArgs>(
      fold_rows_kernel, blocks * fold.shape.layers, kRowsThreads,
      {args, fold.mean.data(), fold.mixing.data(), fold.summary.data(), &all_finite}, seed,
      fold_rows_shared_bytes(fold.shape.width));
}

void check(const Shape& shape, unsigned seeds) {
  const std::string name = std::to_string(shape.width) + " x " + std::to_string(shape.features);
  const Fold given(shape);
  const bool all_finite = true;
  Fold expected = given;
  const FoldArgs args = expected.args();
  fold_prepare_cpu({args, expected.mean.data(), expected.scalars.data()});
  fold_measure_cpu({args, 0, nullptr, expected.core.data(), expected.metric.data()});
  fold_rows_cpu(
      {args, expected.mean.data(), expected.mixing.data(), expected.summary.data(), &all_finite});
  Fold first = given;
  run_on_device(first, true, 0);
  compare(first.delta, expected.delta, 0.0, name + ": delta");
  compare(first.mean, expected.mean, 0.0, name + ": mean");
  compare(first.scalars, expected.scalars, 1e-13, name + ": scalars");
  compare(first.along, expected.along, 1e-13, name + ": along");
  compare(first.core, expected.core, 1e-13, name + ": core");
  compare(first.metric, expected.metric, 1e-13, name + ": metric");
  for (int i = 0; i < shape.layers; ++i) {
    compare(first.bases[i], expected.bases[i], 1e-6, name + ": basis");
    require(identical(first.before[i], expected.before[i]), name + ": rows before");
    require(identical(first.means[i], expected.means[i]), name + ": mean not put in place");
    require(identical(first.products[i], given.products[i]), name + ": products were written");
  }
  if (emulator::kChecksRaces) seeds = 0;  // slow, and one schedule shows them
  for (unsigned seed = 1; seed <= seeds; ++seed) {
    Fold other = given;
    run_on_device(other, true, seed);
    bool same = identical(other.core, first.core) && identical(other.metric, first.metric) &&
                identical(other.scalars, first.scalars);
    for (int i = 0; i < shape.layers; ++i) same = same && identical(other.bases[i], first.bases[i]);
    require(same, name + ": other bits under seed " + std::to_string(seed));
  }
  Fold refused = given;
  run_on_device(refused, false, 1);
  for (int i = 0; i < shape.layers; ++i) {
    require(identical(refused.bases[i], given.bases[i]), name + ": written though not finite");
    require(identical(refused.means[i], given.means[i]), name + ": mean written, not finite");
  }
}

}  // namespace

int main(int argc, char** argv) {
  const bool small = argc > 1 && std::string(argv[1]) == "small";
  try {
    check({1, 1, 1, 16}, 3);
    check({3, 5, 7, 16}, 3);
    check({2, 16, 52, 48}, 3);
    check({1, 36, 5, 16}, 12);
    check({2, 64, 70, 32, 1}, 2);
    check({2, 70, 36, 32}, 1);
    check({2, 4, 64, 32}, 1);  // no column is left over
    if (!small) check({2, 128, 150, 64}, 2);
    if (!small) check({1, 100, 37, 48, 3}, 2);
  } catch (const std::exception& error) {
    std::printf("%s\n", error.what());
    return 1;
  }
  std::printf("all agree\n");
  return 0;
}
