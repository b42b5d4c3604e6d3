#include "fold.h"

#include <algorithm>
#include <vector>

namespace eva_kernels {
namespace {

// The image Y of the basis of layer i, (width, features).
std::vector<double> image_of(const FoldArgs& args, int64_t i) {
  const FoldLayer& layer = args.layers[i];
  const int64_t features = args.features;
  const double* delta = args.delta + i * features;
  std::vector<double> image(static_cast<size_t>(args.width * features));
  for (int row = 0; row < args.width; ++row) {
    const double square = args.squares(i)[row];
    const double along = args.along[i * args.width + row];
    for (int64_t d = 0; d < features; ++d) {
      const int64_t at = row * features + d;
      image[at] = layer.products[at] + layer.basis[at] * square - along * delta[d];
    }
  }
  return image;
}

template <class Left, class Right>
double dot(const Left* left, const Right* right, int64_t count) {
  double sum = 0.0;
  for (int64_t i = 0; i < count; ++i) sum += static_cast<double>(left[i]) * right[i];
  return sum;
}

}  // namespace

void fold_prepare_cpu(const FoldPrepareArgs& args) {
  const FoldArgs& fold = args.fold;
  for (int64_t i = 0; i < fold.n_layers; ++i) {
    const FoldLayer& layer = fold.layers[i];
    const FoldNumbers& numbers = fold.head(i);
    double squared_delta = 0.0, norm = 0.0;
    for (int64_t d = 0; d < fold.features; ++d) {
      const int64_t at = i * fold.features + d;
      const double delta = layer.shift[d] / numbers.added;
      const float mean = static_cast<float>(layer.mean[d] + numbers.share * delta);
      fold.delta[at] = delta;
      args.mean[at] = mean;
      squared_delta += delta * delta;
      norm += static_cast<double>(mean) * mean;
    }
    fold_scalars(*layer.square, numbers.weight * squared_delta, norm,
                 args.scalars + i * kFoldScalars);
  }
}

void fold_measure_cpu(const FoldMeasureArgs& args) {
  const FoldArgs& fold = args.fold;
  const int width = fold.width;
  const int64_t features = fold.features;
  for (int64_t i = 0; i < fold.n_layers; ++i) {
    const float* basis = fold.layers[i].basis;
    for (int row = 0; row < width; ++row) {
      fold.along[i * width + row] =
          fold.head(i).weight * dot(basis + row * features, fold.delta + i * features, features);
    }
    const std::vector<double> image = image_of(fold, i);
    for (int a = 0; a < width; ++a) {
      for (int b = 0; b <= a; ++b) {
        const double* image_a = image.data() + a * features;
        const int64_t lower = (i * width + a) * width + b;
        const int64_t upper = (i * width + b) * width + a;
        args.core[lower] = args.core[upper] = dot(image_a, basis + b * features, features);
        args.metric[lower] = args.metric[upper] =
            dot(image_a, image.data() + b * features, features);
      }
    }
  }
}

void fold_rows_cpu(const FoldRowsArgs& args) {
  const FoldArgs& fold = args.fold;
  const int width = fold.width;
  const int64_t features = fold.features;
  if (!*args.all_finite) return;
  std::vector<double> row(static_cast<size_t>(features));
  for (int64_t i = 0; i < fold.n_layers; ++i) {
    const FoldLayer& layer = fold.layers[i];
    const std::vector<double> image = image_of(fold, i);
    std::copy_n(layer.basis, layer.num_saved * features, layer.saved);
    std::copy_n(args.mean + i * features, features, layer.mean);
    for (int j = 0; j < args.rank(i); ++j) {
      std::fill(row.begin(), row.end(), 0.0);
      for (int a = 0; a < width; ++a) {
        const double factor = args.mixing[(i * width + a) * width + j];
        for (int64_t d = 0; d < features; ++d) row[d] += factor * image[a * features + d];
      }
      std::copy(row.begin(), row.end(), layer.basis + j * features);
    }
  }
}

}  // namespace eva_kernels
