// Runs the device code of the eigen-decomposition under several schedules and checks its defining
// properties (order, orthogonality, residual), relative accuracy where the method guarantees it,
// and that all schedules give the same bits. Exit code 0 if all hold; otherwise 1 and the first
// failure. The argument "small" skips widths that take long.
#include <cmath>
#include <cstdio>
#include <limits>

#include "cuda_emulator.h"
// after the emulator, which replaces the CUDA headers
#include "eigh.cuh"

namespace {

using eva_kernels::EighArgs;
using Real = long double;
using Values = std::vector<double>;

constexpr double kNan = std::numeric_limits<double>::quiet_NaN();
constexpr double kInfinity = std::numeric_limits<double>::infinity();

// Matrices of one width, lower triangles filled, the others NaN: these must not be read.
struct Batch {
  int width;
  std::vector<std::string> names{};
  Values data{};

  double& at(int i, int j) { return data[data.size() - width * width + i * width + j]; }
  void add(const std::string& name, double fill = 0.0) {
    names.push_back(name);
    data.resize(data.size() + width * width, kNan);
    for (int i = 0; i < width; ++i) {
      for (int j = 0; j <= i; ++j) at(i, j) = fill;
    }
  }
};

void add_random(Batch& b, std::mt19937& random) {
  std::normal_distribution<double> normal;
  b.add("random");
  for (int i = 0; i < b.width; ++i) {
    for (int j = 0; j <= i; ++j) b.at(i, j) = normal(random);
  }
}

// D (I + E) D with |E| below 1 and D from 1 to 1e-7, not in order.
void add_graded(Batch& b, std::mt19937& random) {
  std::uniform_real_distribution<double> uniform(-0.5, 0.5);
  const auto scale = [&](int i) {
    return std::pow(10.0, -7.0 * ((i * 5) % b.width) / std::max(1, b.width - 1));
  };
  b.add("graded");
  for (int i = 0; i < b.width; ++i) {
    for (int j = 0; j <= i; ++j) {
      b.at(i, j) = (i == j ? 1.0 : uniform(random) / b.width) * scale(i) * scale(j);
    }
  }
}

// The largest numbers are in the last warp's part; without scaling, their difference overflows.
void add_huge(Batch& b) {
  const int w = b.width;
  b.add("huge", 1.0);
  if (w < 2) return;
  b.at(w - 2, w - 2) = -1.5e308;
  b.at(w - 1, w - 1) = 1.5e308;
  b.at(w - 1, w - 2) = 1e306;
}

Batch make_batch(int width, bool many) {
  Batch b{width};
  std::mt19937 random(width);
  add_random(b, random);
  if (many) {
    b.add("NaN", 1.0);
    b.at(width - 1, width / 2) = kNan;
  }
  add_graded(b, random);
  if (!many) return b;
  b.add("infinite", 1.0);
  b.at(width - 1, 0) = -kInfinity;
  b.add("zero");
  b.add("ones", 1.0);
  b.add("tiny", 1e-305);
  b.add("clustered");
  for (int i = 0; i < width; ++i) {
    for (int j = 0; j <= i; ++j) b.at(i, j) = (i == j) + 1e-9 * std::cos(i + 7 * j);
  }
  b.add("diagonal");
  for (int i = 0; i < width; ++i) b.at(i, i) = 3 - i % 5;
  add_huge(b);
  return b;
}

void require(bool holds, const std::string& what) {
  if (!holds) throw std::runtime_error(what);
}

// Entry (i, j) of V A V^T, V's rows being the vectors, in extended precision.
std::vector<Real> transformed(const double* matrix, const double* vectors, int width) {
  std::vector<Real> half(width * width), full(width * width);
  for (int i = 0; i < width; ++i) {
    for (int k = 0; k < width; ++k) {
      for (int l = 0; l < width; ++l) {
        const double a = k > l ? matrix[k * width + l] : matrix[l * width + k];
        half[i * width + k] += Real(vectors[i * width + l]) * a;
      }
    }
  }
  for (int i = 0; i < width; ++i) {
    for (int j = 0; j < width; ++j) {
      for (int k = 0; k < width; ++k) {
        full[i * width + j] += half[i * width + k] * vectors[j * width + k];
      }
    }
  }
  return full;
}

void check_vectors(const double* vectors, int width, const std::string& name) {
  for (int i = 0; i < width; ++i) {
    int peak = 0;
    for (int k = 0; k < width; ++k) {
      if (std::fabs(vectors[i * width + k]) > std::fabs(vectors[i * width + peak])) peak = k;
    }
    require(vectors[i * width + peak] > 0.0, name + ": sign of vector " + std::to_string(i));
    for (int j = 0; j < width; ++j) {
      Real product = 0;
      for (int k = 0; k < width; ++k) {
        product += Real(vectors[i * width + k]) * vectors[j * width + k];
      }
      require(std::fabs(product - (i == j)) <= 1e-15L * (10 + width), name + ": not orthonormal");
    }
  }
}

void check_matrix(const double* matrix, const double* values, const double* vectors, int width,
                  const std::string& kind) {
  const std::string name = "width " + std::to_string(width) + ", " + kind;
  if (kind == "NaN" || kind == "infinite") {
    for (int i = 0; i < width; ++i) require(std::isnan(values[i]), name + ": a value");
    for (int i = 0; i < width * width; ++i) require(std::isnan(vectors[i]), name + ": a vector");
    return;
  }
  check_vectors(vectors, width, name);
  Real norm = 0;
  for (int i = 0; i < width; ++i) {
    require(i == 0 || values[i - 1] <= values[i], name + ": not ascending");
    norm = std::max(norm, std::fabs(Real(values[i])));
  }
  const std::vector<Real> result = transformed(matrix, vectors, width);
  for (int i = 0; i < width; ++i) {
    for (int j = 0; j < width; ++j) {
      const Real error = std::fabs(result[i * width + j] - (i == j ? values[i] : 0.0));
      const Real scale =
          kind == "graded" ? std::sqrt(std::fabs(Real(values[i]) * values[j])) : norm;
      require(error <= 1e-14L * scale, name + ": entry " + std::to_string(i) + ", " +
                                           std::to_string(j) + " is off by " +
                                           std::to_string(double(error / scale)));
    }
  }
}

template <bool kVectorsInShared>
void run(const Batch& b, unsigned threads, unsigned seed, Values& values, Values& vectors) {
  values.assign(b.names.size() * b.width, -9.0);
  vectors.assign(b.data.size(), -9.0);
  const int64_t count = b.names.size();
  const EighArgs args{b.data.data(), count, b.width, values.data(), vectors.data()};
  emulator::launch<EighArgs>(
      eva_kernels::eigh_kernel<kVectorsInShared>, count, threads, args, seed,
      sizeof(double) * eva_kernels::eigh_shared_size(b.width, kVectorsInShared));
}

bool same_bits(const Values& a, const Values& b) {
  return std::memcmp(a.data(), b.data(), a.size() * sizeof(double)) == 0;
}

void check_width(int width, std::vector<unsigned> thread_counts, unsigned seeds, bool many) {
  Batch b = make_batch(width, many);
  Values first_values, first_vectors, values, vectors;
  run<true>(b, thread_counts[0], 0, first_values, first_vectors);
  const int size = width * width;
  for (size_t i = 0; i < b.names.size(); ++i) {
    check_matrix(&b.data[i * size], &first_values[i * width], &first_vectors[i * size], width,
                 b.names[i]);
  }
  for (const unsigned threads : thread_counts) {
    for (unsigned seed = 1; seed <= seeds; ++seed) {
      for (const bool in_shared : {true, false}) {
        in_shared ? run<true>(b, threads, seed, values, vectors)
                  : run<false>(b, threads, seed, values, vectors);
        require(same_bits(values, first_values) && same_bits(vectors, first_vectors),
                "width " + std::to_string(width) + ": schedule " + std::to_string(seed) + " of " +
                    std::to_string(threads) + " threads gives other bits");
      }
    }
  }
}

}  // namespace

int main(int argc, char** argv) {
  const bool small = argc > 1 && std::string(argv[1]) == "small";
  const unsigned seeds = small ? 1 : 3;
  try {
    check_width(1, {64, 32}, seeds, true);
    check_width(2, {64, 32}, seeds, true);
    check_width(3, {64, 32}, seeds, true);
    check_width(7, {64, 32}, seeds, true);
    check_width(16, {96}, seeds, true);
    check_width(17, {64}, seeds, true);
    check_width(33, {64}, seeds, !small);
    if (!small) check_width(64, {256}, 2, false);
  } catch (const std::exception& error) {
    std::printf("%s\n", error.what());
    return 1;
  }
  std::printf("all agree\n");
  return 0;
}
