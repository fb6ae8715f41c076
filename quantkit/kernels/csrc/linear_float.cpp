// Products with float32 activations.
#include "float_path.h"

namespace qk {

void float_share(const Linear& l, const Rows& r, float* y, int64_t y_stride, int64_t begin, int64_t end, void* scratch) {
  const KeepSubnormals keep;
  switch (l.kind) {
    case kWeightFloat32: return share<FloatPath<kFloats>>(l, r, y, y_stride, begin, end, scratch);
    case kWeightBFloat16: return share<FloatPath<kBFloats>>(l, r, y, y_stride, begin, end, scratch);
    case kWeightU4: return share<FloatPath<kNibbles>>(l, r, y, y_stride, begin, end, scratch);
    case kWeightT4: return share<FloatPath<kTable>>(l, r, y, y_stride, begin, end, scratch);
    case kWeightF8: return share<FloatPath<kFloat8>>(l, r, y, y_stride, begin, end, scratch);
    case kWeightPlanes: return share<FloatPath<kPlanes>>(l, r, y, y_stride, begin, end, scratch);
    case kWeightHighPlane: return share<FloatPath<kHighPlane>>(l, r, y, y_stride, begin, end, scratch);
    default: return share<FloatPath<kBytes>>(l, r, y, y_stride, begin, end, scratch);
  }
}

}  // namespace qk
