// The activations of a gated network, in float.
#pragma once
#include "device.cuh"

namespace qk {

constexpr int kNoActivation = -1;

// `activation`: ACTIVATIONS of kernels/program/reference.py, by position.
__device__ inline float activated(float x, int activation) {
  switch (activation) {
    case 0: return x / (1.0f + expf(-x));
    case 1: return 0.5f * x * (1.0f + erff(x * 0.70710678118654752f));
    case 2: return 0.5f * x * (1.0f + tanhf(0.79788456080286536f * (x + 0.044715f * x * x * x)));
    case 3: return fmaxf(x, 0.0f);
    default: return x > 0 ? x * x : 0.0f;
  }
}

}  // namespace qk
