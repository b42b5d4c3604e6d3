// Runs the device code of the convergence check under several schedules and compares it with a
// plain double computation. Exit code 0 if all agree; otherwise 1 and the first difference.
#include <cmath>
#include <cstdio>
#include <limits>

#include "cuda_emulator.h"
// after the emulator, which replaces the CUDA headers
#include "convergence.cuh"

namespace {

using eva_kernels::ConvergenceArgs;
using eva_kernels::ConvergenceMatrix;

constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
constexpr float kInfinity = std::numeric_limits<float>::infinity();

struct Matrix {
  int rows, columns, rank;
  int gap = 0;             // elements between rows, NaN
  int shift_previous = 0;  // elements before the first row, NaN: moves the alignment
  int shift_current = 0;
  std::vector<float> previous{}, current{};

  float* row(std::vector<float>& data, int shift, int i) {
    return data.data() + shift + i * (columns + gap);
  }
  float* previous_row(int i) { return row(previous, shift_previous, i); }
  float* current_row(int i) { return row(current, shift_current, i); }
};

// The buffers end with the last row, so that AddressSanitizer detects a read past it.
void fill(Matrix& m, std::mt19937& random) {
  std::normal_distribution<float> normal;
  const size_t size = m.rows == 0 ? 0 : m.rows * (m.columns + m.gap) - m.gap;
  m.previous.assign(m.shift_previous + size, kNan);
  m.current.assign(m.shift_current + size, kNan);
  for (int i = 0; i < m.rows; ++i) {
    const float turn = i % 3 == 0 ? 0.01f : 1.0f;
    for (int j = 0; j < m.columns; ++j) {
      const float x = normal(random);
      m.previous_row(i)[j] = x;
      m.current_row(i)[j] = (i % 2 ? -1.0f : 1.0f) * (x + turn * normal(random));
    }
  }
}

std::vector<Matrix> batch() {
  std::vector<Matrix> all = {{0, 8, 0},
                             {4, 256, 4},
                             {5, 7, 3},
                             {3, 1000, 3},
                             {0, 16, 0},
                             {0, 16, 0},
                             {6, 513, 6, 11},
                             {7, 64, 2},
                             {2, 1, 2},
                             {5, 640, 5, 3},
                             {4, 128, 4, 4, 1},
                             {4, 128, 4, 4, 0, 1},
                             {3, 127, 0, 0, 3, 3},
                             {6, 2052, 6, 12},
                             {0, 4, 0}};
  std::mt19937 random(7);
  for (Matrix& m : all) fill(m, random);
  Matrix& special = all[9];
  std::fill_n(special.previous_row(0), special.columns, 0.0f);
  special.current_row(1)[special.columns - 1] = kNan;
  special.previous_row(3)[0] = kInfinity;
  return all;
}

float expected_similarity(const float* x, const float* y, int columns) {
  double xy = 0, xx = 0, yy = 0;
  for (int j = 0; j < columns; ++j) {
    xy += double(x[j]) * y[j];
    xx += double(x[j]) * x[j];
    yy += double(y[j]) * y[j];
  }
  if (xx == 0 || yy == 0) return 0;
  return static_cast<float>(std::fabs(xy) / std::sqrt(xx * yy));
}

bool same(float a, float b) {
  return (std::isnan(a) && std::isnan(b)) || std::fabs(a - b) <= 2e-7f;
}

void check(std::vector<Matrix>& all, float tau, unsigned seed) {
  std::vector<ConvergenceMatrix> table;
  int64_t n_rows = 0;
  for (Matrix& m : all) {
    table.push_back({m.previous_row(0), m.current_row(0), m.columns + m.gap, m.columns + m.gap,
                     m.rows, m.columns, n_rows, m.rank});
    n_rows += m.rows;
  }
  std::vector<float> similarity(n_rows, -9.0f);
  std::vector<int32_t> unconverged(all.size(), 0);
  const ConvergenceArgs args{
      table.data(),      static_cast<int64_t>(table.size()), n_rows, tau, similarity.data(),
      unconverged.data()};
  emulator::launch<ConvergenceArgs>(eva_kernels::convergence_kernel, n_rows,
                                    eva_kernels::kConvergenceThreads, args, seed);
  int64_t row = 0;
  for (size_t i = 0; i < all.size(); ++i) {
    int32_t count = 0;
    for (int j = 0; j < all[i].rows; ++j, ++row) {
      const float expected =
          expected_similarity(all[i].previous_row(j), all[i].current_row(j), all[i].columns);
      if (!same(similarity[row], expected)) {
        throw std::runtime_error("matrix " + std::to_string(i) + " row " + std::to_string(j) +
                                 ": " + std::to_string(similarity[row]) + ", expected " +
                                 std::to_string(expected));
      }
      if (j < all[i].rank && !(expected >= tau)) ++count;
    }
    if (unconverged[i] != count) {
      throw std::runtime_error("matrix " + std::to_string(i) + " counts " +
                               std::to_string(unconverged[i]) + ", expected " +
                               std::to_string(count));
    }
  }
}

}  // namespace

int main() {
  try {
    std::vector<Matrix> all = batch();
    for (unsigned seed = 0; seed < 6; ++seed) {
      for (const float tau : {0.0f, 0.9f, 1.0f}) check(all, tau, seed);
    }
  } catch (const std::exception& error) {
    std::printf("%s\n", error.what());
    return 1;
  }
  std::printf("all agree\n");
  return 0;
}
