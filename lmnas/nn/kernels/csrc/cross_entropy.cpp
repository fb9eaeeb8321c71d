// Linear layer, softmax and cross-entropy with their gradients, a chunk of rows at a time. cross_entropy.py defines what
// is right.
//
// Shapes: N predictions, H width, V classes.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <c10/util/Exception.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <optional>
#include <vector>

#include "functions.h"
#include "products.h"

namespace {

using at::Tensor;
using lmnas::Panels;
using lmnas::pieces;

// One row of logits becomes d loss / d logits = (softmax - one-hot) share; returns the row's loss
template <typename S>
double row_of(S* logits, const S* bias, int64_t classes, int64_t target, S share) {
  if (bias != nullptr)
#pragma omp simd
    for (int64_t v = 0; v < classes; ++v) logits[v] += bias[v];
  S top = logits[0];
#pragma omp simd reduction(max : top)
  for (int64_t v = 0; v < classes; ++v) top = logits[v] > top ? logits[v] : top;
  const S chosen = logits[target] - top;
  // sums of 512 in the type itself, of these in double
  double normaliser = 0;
  constexpr int64_t STRIP = 512;
  for (int64_t from = 0; from < classes; from += STRIP) {
    const int64_t to = std::min(from + STRIP, classes);
    S sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t v = from; v < to; ++v) {
      const S e = lmnas::exponential(logits[v] - top);
      logits[v] = e;
      sum += e;
    }
    normaliser += sum;
  }
  const S factor = share / S(normaliser);
#pragma omp simd
  for (int64_t v = 0; v < classes; ++v) logits[v] *= factor;
  logits[target] -= share;
  return std::log(normaliser) - chosen;
}

template <typename S>
Tensor transposed(const Tensor& x) {
  const int64_t rows = x.size(0), columns = x.size(1);
  Tensor result = at::empty({columns, rows}, x.options());
  const S* from = x.data_ptr<S>();
  S* to = result.data_ptr<S>();
  constexpr int64_t STRIP = 32;
  at::parallel_for(0, pieces(columns, STRIP), 1, [&](int64_t first, int64_t last) {
    for (int64_t strip = first; strip < last; ++strip)
      for (int64_t r0 = 0; r0 < rows; r0 += STRIP)
        for (int64_t c = strip * STRIP; c < std::min((strip + 1) * STRIP, columns); ++c)
          for (int64_t r = r0; r < std::min(r0 + STRIP, rows); ++r) to[c * rows + r] = from[r * columns + c];
  });
  return result;
}

template <typename S>
std::vector<Tensor> with_gradients(
    const Tensor& hidden, const Tensor& weight, const Tensor& bias, const Tensor& targets, int64_t ignore,
    int64_t kept, int64_t chunk, bool wants_hidden, bool wants_weight, bool wants_bias) {
  const int64_t n = hidden.size(0), width = hidden.size(1), classes = weight.size(0);
  const auto options = hidden.options();
  const int64_t* target = targets.data_ptr<int64_t>();
  const S share = S(1.0 / double(kept));
  const Panels<S> forward = lmnas::side_by_side_transposed<S>({weight});
  Panels<S> back;
  if (wants_hidden) back = lmnas::side_by_side<S>({weight});
  Tensor d_hidden = wants_hidden ? at::empty({n, width}, options) : Tensor();
  Tensor d_weight = wants_weight ? at::empty({width, classes}, options) : Tensor();  // transposed
  Tensor d_bias = wants_bias ? at::zeros({classes}, options) : Tensor();
  Tensor buffer = at::empty({std::min(chunk, n), classes}, options);
  S* logits = buffer.data_ptr<S>();
  const S* biases = bias.defined() ? bias.data_ptr<S>() : nullptr;
  std::vector<double> losses(n);

  for (int64_t begin = 0; begin < n; begin += chunk) {
    const int64_t rows = std::min(chunk, n - begin);
    const S* h = hidden.data_ptr<S>() + begin * width;
    lmnas::multiply<S>(h, width, rows, forward, logits, classes, false);
    constexpr int64_t SOME = 8;
    lmnas::each(pieces(rows, SOME), [&](int64_t some) {
      for (int64_t r = some * SOME; r < std::min((some + 1) * SOME, rows); ++r) {
        const int64_t t = target[begin + r];
        if (t != ignore)
          losses[begin + r] = row_of<S>(logits + r * classes, biases, classes, t, share);
        else
          std::fill_n(logits + r * classes, classes, S(0));
      }
    });
    if (wants_hidden)
      lmnas::multiply<S>(logits, classes, rows, back, d_hidden.data_ptr<S>() + begin * width, width, false);
    if (wants_weight)
      lmnas::multiply_once<S>(lmnas::transposed_tiles<S>(h, rows, width, nullptr, 1, options), logits, classes, classes,
                              d_weight.data_ptr<S>(), classes, begin > 0);
    if (wants_bias) {
      S* sums = d_bias.data_ptr<S>();
      constexpr int64_t STRIP = 256;
      at::parallel_for(0, pieces(classes, STRIP), 1, [&](int64_t from, int64_t to) {
        const int64_t first = from * STRIP, last = std::min(to * STRIP, classes);
        for (int64_t r = 0; r < rows; ++r)
#pragma omp simd
          for (int64_t v = first; v < last; ++v) sums[v] += logits[r * classes + v];
      });
    }
  }
  double total = 0;
  for (double loss : losses) total += loss;
  Tensor loss = at::empty({}, options);
  *loss.data_ptr<S>() = S(total / double(kept));
  return {loss, d_hidden, wants_weight ? transposed<S>(d_weight) : Tensor(), d_bias};
}

// The loss alone. The weights, as they lie, are the left operand and the predictions the right one, so nothing is arranged
// but the predictions, and a strip of logits leaves nothing but its maximum and its sum.
template <typename S>
Tensor loss_only(
    const Tensor& hidden, const Tensor& weight, const Tensor& bias, const Tensor& targets, int64_t ignore) {
  const int64_t n = hidden.size(0), width = hidden.size(1), classes = weight.size(0);
  const int64_t* target = targets.data_ptr<int64_t>();
  const S* biases = bias.defined() ? bias.data_ptr<S>() : nullptr;
  constexpr int64_t ROWS = 480, STRIP = 256;
  const int64_t strips = pieces(classes, STRIP);
  double total = 0;
  int64_t kept = 0;
  for (int64_t begin = 0; begin < n; begin += ROWS) {
    const int64_t rows = std::min(ROWS, n - begin);
    const Panels<S> predictions = lmnas::side_by_side_transposed<S>({hidden.narrow(0, begin, rows)});
    std::vector<S> tops(strips * rows), chosen(rows);
    std::vector<double> sums(strips * rows);
    lmnas::each(strips, [&](int64_t strip) {
      std::vector<S> logits(STRIP * rows), part(rows);
      const int64_t first = strip * STRIP, height = std::min(STRIP, classes - first);
      lmnas::multiply<S>(weight.data_ptr<S>() + first * width, width, height, predictions, logits.data(), rows, false);
      S* top = tops.data() + strip * rows;
      for (int64_t v = 0; v < height; ++v) {
        S* row = logits.data() + v * rows;
        const S b = biases == nullptr ? S(0) : biases[first + v];
#pragma omp simd
        for (int64_t r = 0; r < rows; ++r) {
          row[r] += b;
          top[r] = v == 0 || row[r] > top[r] ? row[r] : top[r];
        }
      }
      for (int64_t r = 0; r < rows; ++r) {
        const int64_t t = target[begin + r] - first;
        if (target[begin + r] != ignore && t >= 0 && t < height) chosen[r] = logits[t * rows + r];
      }
      std::fill(part.begin(), part.end(), S(0));
      for (int64_t v = 0; v < height; ++v) {
        const S* row = logits.data() + v * rows;
#pragma omp simd
        for (int64_t r = 0; r < rows; ++r) part[r] += lmnas::exponential(row[r] - top[r]);
      }
      std::copy(part.begin(), part.end(), sums.begin() + strip * rows);
    });
    for (int64_t r = 0; r < rows; ++r) {
      if (target[begin + r] == ignore) continue;
      S top = tops[r];
      for (int64_t strip = 1; strip < strips; ++strip) top = std::max(top, tops[strip * rows + r]);
      double normaliser = 0;
      for (int64_t strip = 0; strip < strips; ++strip)
        normaliser += sums[strip * rows + r] * std::exp(double(tops[strip * rows + r]) - double(top));
      total += std::log(normaliser) + double(top) - double(chosen[r]);
      ++kept;
    }
  }
  Tensor loss = at::empty({}, hidden.options());
  *loss.data_ptr<S>() = S(total / double(kept));
  return loss;
}

// Raises where a target is no class; returns how many count
int64_t checked(const Tensor& targets, int64_t classes, int64_t ignore) {
  const int64_t* target = targets.data_ptr<int64_t>();
  int64_t kept = 0;
  for (int64_t i = 0; i < targets.numel(); ++i) {
    if (target[i] == ignore) continue;
    TORCH_CHECK_INDEX(target[i] >= 0 && target[i] < classes, "Target ", target[i], " is out of bounds.");
    ++kept;
  }
  return kept;
}

template <typename S>
std::vector<Tensor> run(
    const Tensor& hidden, const Tensor& weight, const Tensor& bias, const Tensor& targets, int64_t ignore,
    int64_t chunk, bool wants_hidden, bool wants_weight, bool wants_bias) {
  const int64_t kept = checked(targets, weight.size(0), ignore);
  if (!(wants_hidden || wants_weight || wants_bias))
    return {loss_only<S>(hidden, weight, bias, targets, ignore), Tensor(), Tensor(), Tensor()};
  return with_gradients<S>(hidden, weight, bias, targets, ignore, kept, chunk, wants_hidden, wants_weight, wants_bias);
}

// Loss, then the gradients of hidden, weight and bias; undefined where not wanted
std::vector<Tensor> linear_cross_entropy(
    const Tensor& hidden, const Tensor& weight, const std::optional<Tensor>& bias, const Tensor& targets,
    int64_t ignore, int64_t chunk, bool wants_hidden, bool wants_weight, bool wants_bias) {
  TORCH_CHECK(hidden.dim() == 2 && weight.dim() == 2 && hidden.size(1) == weight.size(1),
              "linear_cross_entropy: hidden is ", hidden.sizes(), ", weight ", weight.sizes());
  TORCH_CHECK(targets.dim() == 1 && targets.size(0) == hidden.size(0) && targets.scalar_type() == at::kLong,
              "linear_cross_entropy: targets are ", targets.sizes(), " for ", hidden.size(0), " predictions");
  TORCH_CHECK(!bias.has_value() || (bias->dim() == 1 && bias->size(0) == weight.size(0)),
              "linear_cross_entropy: a bias for each of ", weight.size(0), " classes expected");
  TORCH_CHECK(weight.size(0) > 0 && chunk > 0, "linear_cross_entropy: no classes");
  const Tensor biases = bias.has_value() ? bias->contiguous() : Tensor();
  const auto with = hidden.scalar_type() == at::kDouble ? &run<double> : &run<float>;
  return with(hidden.contiguous(), weight.contiguous(), biases, targets.contiguous(), ignore, chunk, wants_hidden,
              wants_weight, wants_bias);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(lmnas, library) {
  library.def(
      "linear_cross_entropy(Tensor hidden, Tensor weight, Tensor? bias, Tensor targets, int ignore, int chunk, "
      "bool wants_hidden, bool wants_weight, bool wants_bias) -> Tensor[]");
}

TORCH_LIBRARY_IMPL(lmnas, CPU, library) { library.impl("linear_cross_entropy", &linear_cross_entropy); }
