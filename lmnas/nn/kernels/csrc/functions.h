// exp, tanh and the sigmoid for one element.

#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

namespace lmnas {

// Branch-free, so that compilers vectorise them. float: Cephes' expf and tanhf, within 2 units in the last place.

inline double exponential(double x) { return std::exp(x); }

inline float exponential(float x) {
  x = x < -87.0f ? -87.0f : x;  // written so that NaN passes
  x = x > 88.0f ? 88.0f : x;
  constexpr float round = 12582912.0f;  // 1.5 * 2^23: adding it leaves the nearest integer in the low bits
  const float shifted = x * 1.44269504088896341f + round;
  const float n = shifted - round;
  const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  uint32_t bits;
  std::memcpy(&bits, &shifted, sizeof bits);
  bits = (bits + 127u) << 23;  // 2^n
  float scale;
  std::memcpy(&scale, &bits, sizeof scale);
  return p * scale;
}

template <typename S>
inline S sigmoid(S x) {
  return S(1) / (S(1) + exponential(-x));
}

inline double tangent(double x) { return std::tanh(x); }

inline float tangent(float x) {
  const float size = x < 0.0f ? -x : x;
  const float z = x * x;
  float p = -5.70498872745e-3f;
  p = p * z + 2.06390887954e-2f;
  p = p * z - 5.37397155531e-2f;
  p = p * z + 1.33314422036e-1f;
  p = p * z - 3.33332819422e-1f;
  const float near = x + x * z * p;
  const float far = 1.0f - 2.0f / (exponential(2.0f * size) + 1.0f);
  return size < 0.625f ? near : (x < 0.0f ? -far : far);
}

}  // namespace lmnas
