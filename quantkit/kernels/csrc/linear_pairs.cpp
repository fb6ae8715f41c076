// Products with bfloat16 activations.
#include "float_path.h"

namespace qk {

void pairs_share(const Linear& l, const Rows& r, float* y, int64_t y_stride, int64_t begin, int64_t end, void* scratch) {
  if constexpr (kDotPairs) {  // else no rows have such a form
    const KeepSubnormals keep;
    switch (l.kind) {
      case kWeightBFloat16: return share<FloatPath<kPairs>>(l, r, y, y_stride, begin, end, scratch);
      case kWeightU4:
      case kWeightT4: return share<FloatPath<kNibblePairs>>(l, r, y, y_stride, begin, end, scratch);
      case kWeightF8: return share<FloatPath<kFloat8Pairs>>(l, r, y, y_stride, begin, end, scratch);
      case kWeightPlanes: return share<FloatPath<kPlanePairs>>(l, r, y, y_stride, begin, end, scratch);
      case kWeightHighPlane: return share<FloatPath<kHighPlanePairs>>(l, r, y, y_stride, begin, end, scratch);
      default: return share<FloatPath<kBytePairs>>(l, r, y, y_stride, begin, end, scratch);
    }
  }
}

}  // namespace qk
