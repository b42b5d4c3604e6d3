// Runs the device code of the (Q, Q) part of a fold under several schedules and compares it with
// the code for the CPU; all schedules and places of the vectors must give the same bits. Exit code
// 0 if all agree; otherwise 1 and the first difference. The argument "small" skips widths that take
// long.
#include <cmath>
#include <cstdio>
#include <limits>
#include <numeric>

#include "cuda_emulator.h"
// after the emulator, which replaces the CUDA headers
#include "eigh.cpp"
#include "nystrom.cpp"
#include "nystrom.cuh"

namespace {

using namespace eva_kernels;
using Doubles = std::vector<double>;

constexpr double kNan = std::numeric_limits<double>::quiet_NaN();
constexpr double kLoose = 1e-8;

void require(bool holds, const std::string& what) {
  if (!holds) throw std::runtime_error(what);
}

// Y = V C for a random V with orthonormal rows and a C with the given eigenvalues, whose
// eigenvectors are a second random basis or, if `near`, approximately the rows of V.
struct Layer {
  std::string name;
  Doubles squares;
  double near;  // 0: another basis; otherwise the distance from the rows of V
  double ceiling = 1e6;
};

using Rows = std::vector<Doubles>;

double dot(const Doubles& a, const Doubles& b) {
  double sum = 0.0;
  for (size_t i = 0; i < a.size(); ++i) sum += a[i] * b[i];
  return sum;
}

void orthonormalise(Rows& rows) {
  for (int pass = 0; pass < 2; ++pass) {
    for (size_t i = 0; i < rows.size(); ++i) {
      for (size_t j = 0; j < i; ++j) {
        const double overlap = dot(rows[i], rows[j]);
        for (size_t d = 0; d < rows[i].size(); ++d) rows[i][d] -= overlap * rows[j][d];
      }
      const double norm = std::sqrt(dot(rows[i], rows[i]));
      for (double& x : rows[i]) x /= norm;
    }
  }
}

Rows random_rows(int count, int features, std::mt19937& random) {
  std::normal_distribution<double> normal;
  Rows rows(count, Doubles(features));
  for (Doubles& row : rows) {
    for (double& x : row) x = normal(random);
  }
  return rows;
}

struct Problem {
  int width;
  std::vector<Layer> layers;
  std::vector<Rows> images{};
  Doubles core{}, metric{}, ceiling{}, trace{}, mixing{}, summary{};

  Problem(int w, std::vector<Layer> given) : width(w), layers(std::move(given)) {
    std::mt19937 random(w);
    for (const Layer& layer : layers) add(layer, random);
    mixing.assign(core.size(), kNan);
    summary.assign(layers.size() * nystrom_summary_size(width), kNan);
  }

  void add(const Layer& layer, std::mt19937& random) {
    const int features = 2 * width + 3;
    Rows basis = random_rows(width, features, random);
    orthonormalise(basis);
    if (layer.name == "twice") basis[std::min(1, width - 1)] = basis[0];
    Rows vectors = random_rows(layer.squares.size(), features, random);
    if (layer.near > 0.0) {
      for (size_t i = 0; i < vectors.size(); ++i) {
        for (int d = 0; d < features; ++d) {
          vectors[i][d] = basis[i % width][d] + layer.near * vectors[i][d];
        }
      }
    }
    orthonormalise(vectors);
    Rows image(width, Doubles(features));
    for (int i = 0; i < width; ++i) {
      for (size_t k = 0; k < vectors.size(); ++k) {
        const double factor = layer.squares[k] * dot(basis[i], vectors[k]);
        for (int d = 0; d < features; ++d) image[i][d] += factor * vectors[k][d];
      }
    }
    if (layer.name == "noise") {  // core has directions that metric lacks
      for (int i = 0; i < width; ++i) {
        std::fill(image[i].begin(), image[i].end(), 0.0);
        std::fill(basis[i].begin(), basis[i].end(), 0.0);
        image[i][i] = std::sqrt(layer.squares[i]);
        basis[i][i] = 1.0 / image[i][i];
      }
    }
    const bool unreached = layer.name == "unreached";
    if (unreached) {  // a row orthogonal to the data, whose image is rounding noise
      for (int d = 0; d < features; ++d) image.back()[d] = 3e-6 * layer.squares[0] * vectors[0][d];
    }
    for (int i = 0; i < width; ++i) {
      for (int j = 0; j < width; ++j) {
        // Only the lower triangle of core is read.
        core.push_back(j > i ? kNan : dot(image[i], basis[j]));
        metric.push_back(dot(image[i], image[j]));
      }
    }
    if (unreached) {  // a third of the largest eigenvalue would be added
      std::fill(core.end() - width, core.end(), 0.0);
      core.back() = 3.0 * dot(image.back(), image.back()) / layer.squares[0];
    }
    if (layer.name == "NaN") core[core.size() - width] = kNan;
    if (layer.name == "NaN in metric") metric.back() = kNan;
    ceiling.push_back(layer.ceiling);
    trace.push_back(std::accumulate(layer.squares.begin(), layer.squares.end(), 0.0));
    if (layer.name == "exceeding") trace.back() *= 0.99;
    images.push_back(image);
  }

  NystromArgs args(int goal) {
    return {core.data(),
            metric.data(),
            ceiling.data(),
            trace.data(),
            static_cast<int64_t>(layers.size()),
            width,
            kLoose,
            goal,
            nullptr,
            mixing.data(),
            summary.data()};
  }

  NystromSummary of(int layer) { return summary_of(args(kNystromSolve), layer); }

  // New rows of a layer.
  Rows rows(int layer) const {
    Rows out(width, Doubles(images[layer][0].size()));
    for (int j = 0; j < width; ++j) {
      for (int k = 0; k < width; ++k) {
        const double factor = mixing[(layer * width + k) * width + j];
        for (size_t d = 0; d < out[j].size(); ++d) out[j][d] += factor * images[layer][k][d];
      }
    }
    return out;
  }
};

bool identical(const Doubles& a, const Doubles& b) {
  return std::memcmp(a.data(), b.data(), a.size() * sizeof(double)) == 0;
}

void run_on_device(Problem& problem, int goal, bool in_shared, unsigned seed) {
  NystromArgs args = problem.args(goal);
  const int width = problem.width;
  Doubles scratch(problem.layers.size() * kNystromScratch * width * width, kNan);
  args.scratch = scratch.data();
  emulator::launch<NystromArgs>(
      in_shared ? nystrom_kernel<true> : nystrom_kernel<false>,
      static_cast<unsigned>(problem.layers.size()), eigh_threads(width), args, seed,
      static_cast<int>(sizeof(double)) * eigh_shared_size(width, in_shared));
  for (size_t i = 0; goal == kNystromSolve && i < problem.layers.size(); ++i) {
    // On a device all layers run at once: each must have a part of its own.
    if (problem.layers[i].name.rfind("NaN", 0) == 0) continue;
    require(!std::isnan(scratch[i * kNystromScratch * width * width]), "scratch of another layer");
  }
}

// Compares the leading rows, whose values are well separated, up to sign.
void compare(Problem& found, Problem& reference) {
  for (size_t i = 0; i < found.layers.size(); ++i) {
    const std::string name = found.layers[i].name + ", width " + std::to_string(found.width);
    const NystromSummary one = found.of(i), other = reference.of(i);
    require(*one.rank == *other.rank, name + ": rank " + std::to_string(*one.rank) + ", expected " +
                                          std::to_string(*other.rank));
    require(*one.uneven == *other.uneven, name + ": uneven");
    for (int j = 0; j < found.width; ++j) {
      const double scale = std::max(1e-30, other.squares[0]);
      require(std::fabs(one.squares[j] - other.squares[j]) <= 1e-9 * scale, name + ": squares");
      const bool both = std::isnan(one.captured[j]) && std::isnan(other.captured[j]);
      require(both || one.captured[j] == other.captured[j], name + ": captured");
    }
    const Rows rows = found.rows(i);
    // The host orthonormalises uneven rows again, unless only some rows are missing.
    const bool whole = found.layers[i].name == "low rank" || found.layers[i].name == "few tokens";
    const bool left_off = *one.uneven != 0.0 && !whole;
    for (int j = 0; j < found.width && !left_off; ++j) {
      for (int k = 0; k <= j; ++k) {
        const double target = j == k && j < *one.rank ? 1.0 : 0.0;
        require(std::fabs(dot(rows[j], rows[k]) - target) <= 2 * kLoose,
                name + ": not orthonormal");
      }
    }
    const Rows expected = reference.rows(i);
    for (int j = 0; j < std::min<int>(*one.rank, 3); ++j) {
      require(std::fabs(std::fabs(dot(rows[j], expected[j])) - 1.0) <= 1e-6, name + ": row");
    }
  }
}

Doubles decaying(int count, double ratio) {
  Doubles out;
  for (int i = 0; i < count; ++i) out.push_back(100.0 * std::pow(ratio, i));
  return out;
}

// mixing^T core mixing is the identity up to the rank. A mixing by a Cholesky factor equals that of
// the CPU and is upper triangular: new row j does not depend on later old rows.
void check_white(int width, int goal) {
  std::vector<Layer> layers{{"full", decaying(2 * width + 3, 0.9), 0.0},
                            {"low rank", decaying((width + 1) / 2, 0.9), 0.0},
                            {"twice", decaying(2 * width + 3, 0.9), 0.0},
                            {"no rank", {0.0}, 0.0},
                            {"NaN", decaying(width, 0.9), 0.0},
                            {"few tokens", decaying(width, 0.9), 0.0, std::floor(width / 3.0)}};
  const bool orthogonal = goal == kNystromOrthogonal;
  const Problem given(width, layers);
  Problem reference = given, found = given, other = given;
  nystrom_cpu(reference.args(goal));
  run_on_device(found, goal, true, 0);
  run_on_device(other, goal, false, 1);
  require(identical(other.mixing, found.mixing), "white: other bits");
  // With NaN in the last row, a Cholesky factor has the rows before.
  const int of_nan = orthogonal ? width - 1 : 0;
  const int few = orthogonal ? width : width / 3;
  const int ranks[] = {width, (width + 1) / 2, std::max(1, width - 1), 0, of_nan, few};
  for (int layer = 0; layer < 6; ++layer) {
    const std::string name = "white, " + layers[layer].name + ", width " + std::to_string(width);
    const int rank = ranks[layer];
    require(*found.of(layer).rank == rank && *reference.of(layer).rank == rank, name + ": rank");
    require(*found.of(layer).uneven == (rank < width), name + ": uneven");
    const size_t first = layer * width * width;
    const auto at = [&](const Doubles& matrix, int i, int j) {
      return matrix[first + i * width + j];
    };
    for (int j = 0; j < width; ++j) {
      for (int i = 0; i < width; ++i) {
        const double entry = at(found.mixing, i, j), expected = at(reference.mixing, i, j);
        if (j >= rank && layer < 5) require(entry == 0.0, name + ": rows beyond the rank");
        if (!orthogonal && layer > 0) continue;  // eigenvectors are unique only up to their spans
        require(std::fabs(entry - expected) <= 1e-8 * (std::fabs(expected) + 1e-3), name);
        if (layer == 0 && i > j) require(entry == 0.0, name + ": order");
      }
      for (int i = 0; i < rank && j < rank && layer < 3; ++i) {
        double overlap = 0.0;
        for (int k = 0; k < width; ++k) {
          for (int l = 0; l < width; ++l) {
            const double core = at(given.core, std::max(k, l), std::min(k, l));
            overlap += at(found.mixing, k, i) * core * at(found.mixing, l, j);
          }
        }
        require(std::fabs(overlap - (i == j)) <= 1e-8, name + ": not white");
      }
    }
  }
}

// The last value is rounding noise relative to the first.
Doubles with_noise(int width) {
  Doubles out = decaying(width, 0.9);
  if (width > 1) out.back() = 1e-14 * out.front();
  return out;
}

std::vector<Layer> layers_of(int width) {
  const double steep = std::pow(1e-11, 1.0 / std::max(1, width - 1));
  // Far from the basis, the loss of orthonormality grows with the square of the decay.
  const double mild = std::pow(1e-3, 1.0 / width);
  return {{"steady", decaying(width, 0.9), 1e-3},
          {"fresh", decaying(2 * width, mild), 0.0},
          {"graded", decaying(width, steep), 1e-8},
          {"exceeding", decaying(width, steep), 1e-8},
          {"low rank", decaying((width + 1) / 2, mild * mild), 0.0},
          {"few tokens", decaying(width, 0.9), 1e-2, std::floor(width / 3.0)},
          {"nearly singular", decaying(2 * width, std::pow(1e-7, 1.0 / width)), 0.0},
          {"noise", with_noise(width), 0.0},
          {"unreached", decaying((width + 1) / 2, 0.9), 0.0},
          {"nothing", {0.0}, 0.0},
          {"NaN", decaying(width, 0.9), 1e-2},
          {"NaN in metric", decaying(width, 0.9), 1e-2}};
}

void check(int width, unsigned seeds) {
  const Problem given(width, layers_of(width));
  Problem reference = given;
  nystrom_cpu(reference.args(kNystromSolve));
  Problem first = given;
  run_on_device(first, kNystromSolve, true, 0);
  compare(first, reference);
  for (size_t i = 0; i < given.layers.size() && width > 1; ++i) {
    const std::string& name = given.layers[i].name;
    if (name.rfind("NaN", 0) == 0) continue;
    if (name == "exceeding") {  // no noise floor ends that, and none is kept
      require(*reference.of(i).rank == width, name + ": rank");
      continue;
    }
    const double* squares = reference.of(i).squares;
    const double sum = std::accumulate(squares, squares + width, 0.0);
    require(sum <= (1.0 + kNystromExcess) * given.trace[i], name + ": sum");
  }
  for (unsigned seed = 1; seed <= seeds; ++seed) {
    Problem other = given;
    run_on_device(other, kNystromSolve, seed % 2 == 0, seed);
    require(identical(other.mixing, first.mixing) && identical(other.summary, first.summary),
            "other bits under seed " + std::to_string(seed));
  }
}

}  // namespace

int main(int argc, char** argv) {
  const bool small = argc > 1 && std::string(argv[1]) == "small";
  try {
    check(1, 1);
    check(5, small ? 1 : 3);
    check(16, small ? 1 : 3);
    if (!small) check(33, 2);
    for (const int width : {1, 17}) {
      check_white(width, kNystromWhiten);
      check_white(width, kNystromOrthogonal);
    }
    if (!small) check(70, 1);
  } catch (const std::exception& error) {
    std::printf("%s\n", error.what());
    return 1;
  }
  std::printf("all agree\n");
  return 0;
}
