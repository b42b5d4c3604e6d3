#include "nystrom.h"

#include <algorithm>
#include <cmath>
#include <optional>
#include <utility>
#include <vector>

#include "eigh.h"

namespace eva_kernels {
namespace {

// A square matrix, row-major.
struct Matrix {
  explicit Matrix(int width) : width(width), entries(size_t(width) * width) {}
  Matrix(int width, const double* from) : width(width), entries(from, from + width * width) {}

  double& at(int i, int j) { return entries[i * width + j]; }
  double at(int i, int j) const { return entries[i * width + j]; }

  int width;
  std::vector<double> entries;
};

template <class Entry>
Matrix matrix_of(int width, Entry entry) {
  Matrix out(width);
  for (int i = 0; i < width; ++i) {
    for (int j = 0; j < width; ++j) out.at(i, j) = entry(i, j);
  }
  return out;
}

Matrix product(const Matrix& left, const Matrix& right) {
  Matrix out(left.width);
  for (int i = 0; i < left.width; ++i) {
    for (int k = 0; k < left.width; ++k) {
      for (int j = 0; j < left.width; ++j) out.at(i, j) += left.at(i, k) * right.at(k, j);
    }
  }
  return out;
}

Matrix transposed(const Matrix& of) {
  return matrix_of(of.width, [&](int i, int j) { return of.at(j, i); });
}

// L^-1 of the Cholesky factor L. Rows and columns whose pivot is not above `cut` are skipped: their
// rows of L^-1 are 0.
struct InverseFactor {
  Matrix rows;
  std::vector<bool> kept;
  double norm = 0.0;  // |L^-1|_F^2

  int rank() const { return static_cast<int>(std::count(kept.begin(), kept.end(), true)); }
};

InverseFactor inverse_factor(const Matrix& matrix, double cut) {
  const int width = matrix.width;
  Matrix lower(width);
  InverseFactor out{Matrix(width), std::vector<bool>(width)};
  for (int i = 0; i < width; ++i) {
    double pivot = matrix.at(i, i);
    for (int j = 0; j < i; ++j) {
      if (!out.kept[j]) continue;
      double rest = matrix.at(i, j);
      for (int k = 0; k < j; ++k) rest -= lower.at(i, k) * lower.at(j, k);
      lower.at(i, j) = rest / lower.at(j, j);
      pivot -= lower.at(i, j) * lower.at(i, j);
    }
    out.kept[i] = pivot > cut;
    if (!out.kept[i]) continue;
    lower.at(i, i) = std::sqrt(pivot);
    for (int j = 0; j <= i; ++j) {
      double rest = i == j ? 1.0 : 0.0;
      for (int k = j; k < i; ++k) rest -= lower.at(i, k) * out.rows.at(k, j);
      out.rows.at(i, j) = rest / lower.at(i, i);
      out.norm += out.rows.at(i, j) * out.rows.at(i, j);
    }
  }
  return out;
}

struct Pairs {
  std::vector<double> values;  // ascending
  Matrix vectors;              // rows
};

Pairs eigenpairs(const Matrix& matrix) {
  Pairs out{std::vector<double>(matrix.width), Matrix(matrix.width)};
  eigh_cpu({matrix.entries.data(), 1, matrix.width, out.values.data(), out.vectors.entries.data()});
  return out;
}

// 1 / sqrt(x) where x is above the floor, otherwise 0.
double inverse_root(double x, double floor) { return x > floor ? 1.0 / std::sqrt(x) : 0.0; }

// Factors that scale the core to a unit diagonal; 0 for diagonal entries that are not above `noise`
// times the largest.
std::vector<double> scale_of(const Matrix& core, double noise) {
  double largest = 0.0;
  for (int i = 0; i < core.width; ++i) largest = std::max(largest, core.at(i, i));
  std::vector<double> scale(core.width);
  for (int i = 0; i < core.width; ++i) {
    scale[i] = inverse_root(core.at(i, i), largest * noise);
  }
  return scale;
}

// Only the lower triangle is used, by factorisations and eigen-decomposition.
Matrix scaled_core(const Matrix& core, const std::vector<double>& scale) {
  return matrix_of(core.width, [&](int i, int j) { return core.at(i, j) * scale[i] * scale[j]; });
}

struct RankedRows {
  Matrix matrix;
  int rank;  // rows from this one on are 0
};

// Rows that whiten the core; nullopt if it is not finite.
std::optional<RankedRows> whitener(const Matrix& core, double noise, bool regular) {
  const int width = core.width;
  const std::vector<double> scale = scale_of(core, noise);
  const Matrix scaled = scaled_core(core, scale);
  const InverseFactor inverse = inverse_factor(scaled, 0.0);
  if (regular && inverse.rank() == width && inverse.norm < kNystromRegular) {
    const auto entry = [&](int i, int j) { return inverse.rows.at(i, j) * scale[j]; };
    return RankedRows{matrix_of(width, entry), width};
  }
  const Pairs pairs = eigenpairs(scaled);
  if (!eigh_is_finite(pairs.values.back())) return std::nullopt;
  const auto entry = [&](int i, int j) {
    const int from = width - 1 - i;
    return inverse_root(pairs.values[from], kNystromCut) * pairs.vectors.at(from, j) * scale[j];
  };
  const auto above = [](double value) { return value > kNystromCut; };
  const auto rank = std::count_if(pairs.values.begin(), pairs.values.end(), above);
  return RankedRows{matrix_of(width, entry), static_cast<int>(rank)};
}

// The matrix that orthonormalises rows with this Gram matrix. Dependent rows are dropped: as many
// rows at the end are 0.
RankedRows orthogonalisation(const Matrix& overlaps) {
  const std::vector<double> scale = scale_of(overlaps, 0.0);
  const InverseFactor inverse = inverse_factor(scaled_core(overlaps, scale), kNystromNoise);
  RankedRows out{Matrix(overlaps.width), 0};
  for (int i = 0; i < overlaps.width; ++i) {
    if (!inverse.kept[i]) continue;
    for (int j = 0; j < overlaps.width; ++j) {
      out.matrix.at(out.rank, j) = inverse.rows.at(i, j) * scale[j];
    }
    ++out.rank;
  }
  return out;
}

// The deviation from orthonormality: the Gram matrix of the new rows minus the identity.
Matrix deviations(const Matrix& rows, const Matrix& metric, int rank) {
  Matrix out = product(product(rows, metric), transposed(rows));
  for (int i = 0; i < rank; ++i) out.at(i, i) -= 1.0;
  return out;
}

int rank_of(const std::vector<double>& ascending, double ceiling) {
  const double floor = kNystromNoise * std::max(ascending.back(), 0.0);
  int rank = 0;
  for (const double value : ascending) rank += value > floor;  // false for NaN
  return std::min(rank, static_cast<int>(std::max(ceiling, 0.0)));
}

// Rows R that whiten the core, and the eigenpairs of R (Y Y^T) R^T.
struct Solution {
  Matrix rows;
  Pairs pairs;
};

// nullopt if a matrix is not finite.
std::optional<Solution> solution(const Matrix& core, const Matrix& metric, double noise) {
  auto white = whitener(core, noise, true);
  if (!white) return std::nullopt;
  Pairs pairs = eigenpairs(product(product(white->matrix, metric), transposed(white->matrix)));
  if (!eigh_is_finite(pairs.values.back())) return std::nullopt;
  return Solution{std::move(white->matrix), std::move(pairs)};
}

// Whether the positive eigenvalues sum to more than the trace allows.
bool exceeds_trace(const std::vector<double>& values, const double* trace) {
  double sum = 0.0;
  for (const double value : values) sum += std::max(value, 0.0);
  return trace != nullptr && sum > (1.0 + kNystromExcess) * *trace;
}

void solve(const NystromArgs& args, int64_t layer) {
  const int width = args.width;
  const int64_t size = int64_t(width) * width;
  const Matrix core(width, args.core + layer * size), metric(width, args.metric + layer * size);
  const NystromSummary summary = summary_of(args, layer);
  std::fill_n(summary.squares, width, 0.0);
  for (int i = 0; i < width; ++i) {
    summary.captured[i] = core.at(i, i) < 0.0 ? 0.0 : core.at(i, i);  // NaN stays
  }
  double* mixing = args.mixing + layer * size;
  const auto finish = [&](const Matrix& rows, int rank, bool uneven) {
    *summary.rank = rank;
    *summary.uneven = uneven;
    const Matrix out = transposed(rows);
    std::copy(out.entries.begin(), out.entries.end(), mixing);
  };

  if (args.goal == kNystromOrthogonal) {
    const RankedRows rows = orthogonalisation(core);
    return finish(rows.matrix, rows.rank, rows.rank < width);
  }
  const double ceiling = args.ceiling[layer];
  if (args.goal == kNystromWhiten) {
    const auto white = whitener(core, 0.0, ceiling >= width);
    if (!white) return finish(Matrix(width), 0, true);
    const int rank = ceiling < white->rank ? static_cast<int>(std::max(ceiling, 0.0)) : white->rank;
    return finish(white->matrix, rank, rank < width);
  }
  const double* trace = args.trace == nullptr ? nullptr : args.trace + layer;
  auto found = solution(core, metric, kNystromNoise);
  for (int i = 1; i <= kNystromTries && found && exceeds_trace(found->pairs.values, trace); ++i) {
    found = solution(core, metric, nystrom_noise(i));
  }
  if (!found) return finish(Matrix(width), 0, true);
  const Pairs& pairs = found->pairs;
  const int rank = rank_of(pairs.values, ceiling);
  const Matrix mixed_rows =
      product(matrix_of(width,
                        [&](int i, int j) {
                          if (i >= rank) return 0.0;
                          const int from = width - 1 - i;
                          return pairs.vectors.at(from, j) / std::sqrt(pairs.values[from]);
                        }),
              found->rows);
  for (int i = 0; i < rank; ++i) summary.squares[i] = pairs.values[width - 1 - i];
  double largest_deviation = 0.0;
  for (const double deviation : deviations(mixed_rows, metric, rank).entries) {
    largest_deviation = std::max(largest_deviation, std::fabs(deviation));
  }
  finish(mixed_rows, rank, rank < width || !(largest_deviation <= args.tolerance));
}

}  // namespace

void nystrom_cpu(const NystromArgs& args) {
  if (args.width == 0) return;
  for (int64_t layer = 0; layer < args.n_layers; ++layer) solve(args, layer);
}

}  // namespace eva_kernels
