#include "start.h"

#include <algorithm>

namespace eva_kernels {
namespace {

struct Cpu {
  void set_up(const StartArgs& args, const StartParts& parts) const {
    *parts.layers = args.layer;
    *parts.all_finite = true;
    for (int i = 0; i < 2 * (kFoldNumbers + args.width); ++i) {
      parts.numbers[i] = start_number(i, args.width, args.tokens);
    }
  }
  void clear(const StartArgs& args, const StartParts& parts) const {
    std::fill_n(args.sums.products, args.width * args.features, 0.0f);
    std::fill_n(args.sums.shift, args.features, 0.0);
    std::fill_n(parts.delta, args.features, 0.0);
    *args.sums.square = 0.0;
  }
  void prepare(const FoldPrepareArgs& args) const { fold_prepare_cpu(args); }
  void measure(const FoldMeasureArgs& args) const { fold_measure_cpu(args); }
  void decompose(const NystromArgs& args) const { nystrom_cpu(args); }
  void rows(const FoldRowsArgs& args) const { fold_rows_cpu(args); }
};

}  // namespace

void start_cpu(const StartArgs& args) { run_start(args, Cpu()); }

}  // namespace eva_kernels
