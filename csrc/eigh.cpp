#include "eigh.h"

#include <algorithm>
#include <numeric>
#include <vector>

namespace eva_kernels {
namespace {

// Both triangles are stored, so that a rotation works on contiguous rows.
struct Workspace {
  explicit Workspace(int width)
      : matrix(size_t(width) * width), vectors(size_t(width) * width), order(width) {}

  std::vector<double> matrix;
  std::vector<double> vectors;  // rows
  std::vector<int> order;
};

// Returns the largest magnitude of the lower triangle, NaN if an entry is not finite.
double largest_entry(const double* matrix, int width) {
  double largest = 0.0;
  for (int i = 0; i < width; ++i) {
    for (int j = 0; j <= i; ++j) {
      const double x = matrix[i * width + j];
      if (!eigh_is_finite(x)) return kEighNan;
      largest = std::max(largest, std::fabs(x));
    }
  }
  return largest;
}

bool rotate(Workspace& work, int width, int p, int q) {
  double* row_p = &work.matrix[size_t(p) * width];
  double* row_q = &work.matrix[size_t(q) * width];
  double a_pp = row_p[p], a_qq = row_q[q], off = row_q[p];
  Rotation rotation;
  if (!jacobi_rotation(a_pp, a_qq, off, rotation)) return false;
  for (int k = 0; k < width; ++k) rotation.apply(row_p[k], row_q[k]);
  row_p[p] = a_pp;
  row_q[q] = a_qq;
  row_p[q] = row_q[p] = off;
  for (int k = 0; k < width; ++k) {
    work.matrix[size_t(k) * width + p] = row_p[k];
    work.matrix[size_t(k) * width + q] = row_q[k];
  }
  double* vector_p = &work.vectors[size_t(p) * width];
  double* vector_q = &work.vectors[size_t(q) * width];
  for (int k = 0; k < width; ++k) rotation.apply(vector_p[k], vector_q[k]);
  return true;
}

void diagonalise(Workspace& work, int width) {
  for (int sweep = 0; sweep < kEighMaxSweeps; ++sweep) {
    bool rotated = false;
    for (int p = 0; p < width; ++p) {
      for (int q = p + 1; q < width; ++q) rotated |= rotate(work, width, p, q);
    }
    if (!rotated) return;
  }
}

void decompose(const double* matrix, int width, Workspace& work, double* values, double* vectors) {
  const double largest = largest_entry(matrix, width);
  if (std::isnan(largest)) {
    std::fill_n(values, width, largest);
    std::fill_n(vectors, width * width, largest);
    return;
  }
  const int exponent = eigh_exponent(largest);
  for (int i = 0; i < width; ++i) {
    for (int j = 0; j <= i; ++j) {
      const double x = std::scalbn(matrix[i * width + j], -exponent);
      work.matrix[i * width + j] = work.matrix[j * width + i] = x;
    }
  }
  std::fill(work.vectors.begin(), work.vectors.end(), 0.0);
  for (int i = 0; i < width; ++i) work.vectors[i * (width + 1)] = 1.0;
  diagonalise(work, width);

  std::iota(work.order.begin(), work.order.end(), 0);
  std::stable_sort(work.order.begin(), work.order.end(), [&](int i, int j) {
    return work.matrix[i * (width + 1)] < work.matrix[j * (width + 1)];
  });
  for (int rank = 0; rank < width; ++rank) {
    const int i = work.order[rank];
    values[rank] = std::scalbn(work.matrix[i * (width + 1)], exponent);
    const double* row = &work.vectors[size_t(i) * width];
    const double* peak = std::max_element(
        row, row + width, [](double x, double y) { return std::fabs(x) < std::fabs(y); });
    const double sign = *peak < 0.0 ? -1.0 : 1.0;
    for (int k = 0; k < width; ++k) vectors[rank * width + k] = sign * row[k];
  }
}

}  // namespace

void eigh_cpu(const EighArgs& args) {
  const int64_t size = int64_t(args.width) * args.width;
  Workspace work(args.width);
  for (int64_t m = 0; m < args.n_matrices; ++m) {
    decompose(args.matrices + m * size, args.width, work, args.values + m * args.width,
              args.vectors + m * size);
  }
}

}  // namespace eva_kernels
