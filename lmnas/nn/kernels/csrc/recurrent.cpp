// The recurrent cell over a whole segment: forward, and backward by hand. reference.py defines what is right.
//
// Every node that others read is a *source*: the weights of its readers stand side by side, so that one matrix product
// per source and time step serves them all, forward and backward, and one product over all time steps gives their
// gradients. Everything between two products is one pass over blocks of rows, two where batch statistics are needed.
// Blocks do not depend on the number of threads, so no sum does.
//
// Kept for backward: the products [c, a], the states, and the deviations of batch norm. Activations are computed again.
// Backward writes the gradients of the products over the products, so a tape serves once.
//
// Shapes: T time, B batch, H width, N nodes after node 0, R readers of a source, K operations of a mixture.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/add.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/mul.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>
#include <c10/util/Exception.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <optional>
#include <string>
#include <tuple>
#include <type_traits>
#include <vector>
#ifdef __linux__
#include <sys/mman.h>
#endif

#include "functions.h"
#include "products.h"

namespace {

using at::Tensor;
using at::TensorList;
using c10::IntArrayRef;
using lmnas::Panels;
using lmnas::sigmoid;
using lmnas::tangent;
using OptionalTensor = std::optional<Tensor>;

constexpr int64_t K = 4;  // tanh, relu, sigmoid, identity: the order of OPS in reference.py
constexpr double EPSILON = 1e-5;
constexpr int64_t BLOCKS = 16;          // of rows, in a pass between products
constexpr int64_t SERIAL_BELOW = 8192;  // elements of a pass under which waking other threads costs more than it saves

enum BatchNorm { NONE = 0, NODES = 1, OUTPUT = 2 };

// ---------------------------------------------------------------------------------------------------- functions

template <typename S>
struct Activation {
  S value, slope;
};

// f(a) and f'(a) of one operation
template <typename S>
struct Tanh {
  static constexpr S total = 1;
  inline S operator()(S a) const { return tangent(a); }
  inline Activation<S> with_slope(S a) const {
    const S f = tangent(a);
    return {f, S(1) - f * f};
  }
};
template <typename S>
struct Relu {
  static constexpr S total = 1;
  inline S operator()(S a) const { return a < S(0) ? S(0) : a; }
  inline Activation<S> with_slope(S a) const { return {a < S(0) ? S(0) : a, a > S(0) ? S(1) : S(0)}; }
};
template <typename S>
struct Sigmoid {
  static constexpr S total = 1;
  inline S operator()(S a) const { return sigmoid(a); }
  inline Activation<S> with_slope(S a) const {
    const S f = sigmoid(a);
    return {f, f * (S(1) - f)};
  }
};
template <typename S>
struct Identity {
  static constexpr S total = 1;
  inline S operator()(S a) const { return a; }
  inline Activation<S> with_slope(S a) const { return {a, S(1)}; }
};

// sum_k p_k f_k(a): tanh and sigmoid both come from t = tanh(a / 2), which keeps small values exact
template <typename S>
struct Mixture {
  S p[K];
  S total;  // sum_k p_k

  // named and not an array: loops over arrays of local variables are not vectorised
  struct Values {
    S tanh, relu, sigmoid, identity;
  };
  static inline Values values(S a) {
    const S t = tangent(a * S(0.5));
    return {(t + t) / (S(1) + t * t), a < S(0) ? S(0) : a, S(0.5) + S(0.5) * t, a};
  }
  inline S blend(const Values& f) const {
    return p[0] * f.tanh + p[1] * f.relu + p[2] * f.sigmoid + p[3] * f.identity;
  }
  inline S slope(const Values& f) const {
    const S step = f.identity > S(0) ? S(1) : S(0);
    return p[0] * (S(1) - f.tanh * f.tanh) + p[1] * step + p[2] * (f.sigmoid * (S(1) - f.sigmoid)) + p[3];
  }
  inline S operator()(S a) const { return blend(values(a)); }
};

// ---------------------------------------------------------------------------------------------------- rows

// out (+)= P s + sigmoid(c) (f(a) - P s) for one row of one edge, P the total weight of its operations
template <bool first, typename S, typename F>
void gate_row(const F& f, const S* c, const S* a, const S* s, S* out, int64_t width) {
#pragma omp simd
  for (int64_t h = 0; h < width; ++h) {
    const S carried = f.total * s[h];
    const S gated = carried + sigmoid(c[h]) * (f(a[h]) - carried);
    out[h] = first ? gated : out[h] + gated;
  }
}

// c, a <- their gradients; ds += the gradient of s; g is that of the output
template <typename S, typename F>
void gate_row_backward(const F& f, const S* g, S* c, S* a, const S* s, S* ds, int64_t width) {
#pragma omp simd
  for (int64_t h = 0; h < width; ++h) {
    const S gate = sigmoid(c[h]);
    const S open = S(1) - gate;
    const Activation<S> act = f.with_slope(a[h]);
    const S through = g[h] * gate;
    c[h] = through * open * (act.value - s[h]);
    a[h] = through * act.slope;
    ds[h] += g[h] * open;
  }
}

// dp (K rows of H): sums over the rows, per column; null: not wanted
template <bool wants_p, typename S>
void mixture_row_backward(
    const Mixture<S>& f, const S* g, S* c, S* a, const S* s, S* ds, S* dp, int64_t width) {
  S* d0 = dp;
  S* d1 = dp + width;
  S* d2 = dp + 2 * width;
  S* d3 = dp + 3 * width;
#pragma omp simd
  for (int64_t h = 0; h < width; ++h) {
    const typename Mixture<S>::Values v = Mixture<S>::values(a[h]);
    const S gate = sigmoid(c[h]);
    const S open = S(1) - gate;
    const S through = g[h] * gate;
    const S kept = g[h] * open;
    c[h] = through * open * (f.blend(v) - f.total * s[h]);
    a[h] = through * f.slope(v);
    ds[h] += kept * f.total;
    if (wants_p) {
      d0[h] += kept * s[h] + through * v.tanh;
      d1[h] += kept * s[h] + through * v.relu;
      d2[h] += kept * s[h] + through * v.sigmoid;
      d3[h] += kept * s[h] + through * v.identity;
    }
  }
}

template <typename Run>
void with_operation(int64_t op, Run run) {
  switch (op) {
    case 0: return run(std::integral_constant<int, 0>());
    case 1: return run(std::integral_constant<int, 1>());
    case 2: return run(std::integral_constant<int, 2>());
    default: return run(std::integral_constant<int, 3>());
  }
}

template <typename S, int op>
using Operation = std::tuple_element_t<op, std::tuple<Tanh<S>, Relu<S>, Sigmoid<S>, Identity<S>>>;

// ---------------------------------------------------------------------------------------------------- blocks

// Rows of a batch in at most BLOCKS blocks of one height
struct Blocks {
  explicit Blocks(int64_t rows) : rows(rows), height(std::max<int64_t>(1, lmnas::pieces(rows, BLOCKS))),
                                  count(lmnas::pieces(rows, height)) {}

  // run(block, first row, end of its rows) for all blocks
  template <typename Run>
  void over(int64_t elements, Run run) const {
    const auto one = [&](int64_t block) { run(block, block * height, std::min((block + 1) * height, rows)); };
    if (elements < SERIAL_BELOW)
      for (int64_t block = 0; block < count; ++block) one(block);
    else
      lmnas::each(count, one);
  }

  int64_t rows, height, count;
};

// Column statistics of a batch, by blocks of its rows, put together in the order of the blocks. Sums in double, as in
// torch's own variance.
class Statistics {
 public:
  Statistics(const Blocks& blocks, int64_t width)
      : blocks_(blocks), width_(width), first_(blocks.count * width), second_(blocks.count * width) {}

  // Sums, and squared deviations from the block's own mean
  template <typename S>
  void moments(int64_t block, const S* x, int64_t begin, int64_t end) {
    double* sum = first_.data() + block * width_;
    double* square = second_.data() + block * width_;
    std::fill_n(sum, width_, 0.0);
    std::fill_n(square, width_, 0.0);
    for (int64_t b = begin; b < end; ++b) {
      const S* row = x + b * width_;
#pragma omp simd
      for (int64_t h = 0; h < width_; ++h) sum[h] += row[h];
    }
    const double share = 1.0 / double(end - begin);
    for (int64_t b = begin; b < end; ++b) {
      const S* row = x + b * width_;
#pragma omp simd
      for (int64_t h = 0; h < width_; ++h) {
        const double away = row[h] - sum[h] * share;
        square[h] += away * away;
      }
    }
  }

  // mean (H) and 1 / sqrt(variance + epsilon) (H) of all rows
  template <typename S>
  void normaliser(S* mean, S* deviation) const {
    std::vector<double> centre(width_), square(width_);
    for (int64_t block = 0; block < blocks_.count; ++block)
      for (int64_t h = 0; h < width_; ++h) centre[h] += first_[block * width_ + h];
    for (double& m : centre) m /= double(blocks_.rows);
    for (int64_t block = 0; block < blocks_.count; ++block) {
      const double n = double(std::min(blocks_.height, blocks_.rows - block * blocks_.height));
#pragma omp simd
      for (int64_t h = 0; h < width_; ++h) {
        const double away = first_[block * width_ + h] / n - centre[h];
        square[h] += second_[block * width_ + h] + n * away * away;
      }
    }
    for (int64_t h = 0; h < width_; ++h) {
      mean[h] = S(centre[h]);
      deviation[h] = S(1.0 / std::sqrt(square[h] / double(blocks_.rows) + EPSILON));
    }
  }

  // Sums of the gradient g and of g y
  template <typename S>
  void gradients(int64_t block, const S* g, const S* y, int64_t begin, int64_t end) {
    double* sum = first_.data() + block * width_;
    double* product = second_.data() + block * width_;
    std::fill_n(sum, width_, 0.0);
    std::fill_n(product, width_, 0.0);
    for (int64_t b = begin; b < end; ++b) {
      const S* dy = g + b * width_;
      const S* out = y + b * width_;
#pragma omp simd
      for (int64_t h = 0; h < width_; ++h) {
        sum[h] += dy[h];
        product[h] += double(dy[h]) * out[h];
      }
    }
  }

  // Their means over all rows
  template <typename S>
  void means(S* sum, S* product) const {
    std::vector<double> a(width_), b(width_);
    for (int64_t block = 0; block < blocks_.count; ++block)
      for (int64_t h = 0; h < width_; ++h) {
        a[h] += first_[block * width_ + h];
        b[h] += second_[block * width_ + h];
      }
    for (int64_t h = 0; h < width_; ++h) {
      sum[h] = S(a[h] / double(blocks_.rows));
      product[h] = S(b[h] / double(blocks_.rows));
    }
  }

 private:
  Blocks blocks_;
  int64_t width_;
  std::vector<double> first_, second_;
};

// ---------------------------------------------------------------------------------------------------- graph

// What node i reads: `source` through columns [slot * 2H, (slot + 1) * 2H) of that source's product.
struct Edge {
  int64_t source;  // -1: h before the step (node 0 only)
  int64_t slot;
  int64_t op;   // operation code; -1: a mixture
  int64_t row;  // of p_edges, in a mixture; -1: p_input
};

struct Graph {
  int64_t n_nodes;
  std::vector<std::vector<Edge>> into;        // by node 0..N
  std::vector<std::vector<int64_t>> readers;  // by source 0..N: indices into w_nodes, in the order of the slots
};

Graph path_graph(IntArrayRef ops, IntArrayRef sources) {
  Graph graph{int64_t(sources.size()), {}, std::vector<std::vector<int64_t>>(sources.size() + 1)};
  graph.into.push_back({Edge{-1, 0, ops[0], -1}});
  for (int64_t node = 1; node <= graph.n_nodes; ++node) {
    auto& readers = graph.readers[sources[node - 1]];
    graph.into.push_back({Edge{sources[node - 1], int64_t(readers.size()), ops[node], -1}});
    readers.push_back(node - 1);
  }
  return graph;
}

Graph mixture_graph(int64_t n_nodes, bool per_edge) {
  Graph graph{n_nodes, {{Edge{-1, 0, -1, -1}}}, std::vector<std::vector<int64_t>>(n_nodes + 1)};
  int64_t row = 0;
  for (int64_t node = 1; node <= n_nodes; ++node) {
    graph.into.emplace_back();
    for (int64_t source = 0; source < node; ++source, ++row) {
      auto& readers = graph.readers[source];
      graph.into[node].push_back(Edge{source, int64_t(readers.size()), -1, row});
      readers.push_back(per_edge ? row : node - 1);
    }
  }
  return graph;
}

// ---------------------------------------------------------------------------------------------------- memory

// The tape of a search step is hundreds of megabytes; handed back to the system after every step, it would cost a page
// fault per 4 kB at the next. One block is kept between calls.
class Arena {
 public:
  Tensor borrow(int64_t count, const at::TensorOptions& options) {
    const size_t size = std::max<size_t>(count * options.dtype().itemsize(), 1);
    void* block = nullptr;
    size_t capacity = 0;
    {
      std::lock_guard<std::mutex> lock(mutex_);
      if (block_ != nullptr && size <= capacity_ && capacity_ / 4 <= size) {
        std::swap(block, block_);
        capacity = capacity_;
      }
    }
    if (block == nullptr) {
      release();
      capacity = (size + PAGE - 1) / PAGE * PAGE;
      block = std::aligned_alloc(size < PAGE ? 64 : PAGE, capacity);
      TORCH_CHECK_WITH(OutOfMemoryError, block != nullptr, "recurrent cell: cannot allocate ", capacity, " bytes");
#ifdef __linux__
      madvise(block, capacity, MADV_HUGEPAGE);
#endif
    }
    return at::from_blob(block, {count}, [this, capacity](void* p) { give_back(p, capacity); }, options);
  }

  void release() { give_back(nullptr, 0); }

 private:
  static constexpr size_t PAGE = size_t(1) << 21;

  void give_back(void* block, size_t capacity) {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      std::swap(block, block_);
      capacity_ = capacity;
    }
    std::free(block);
  }

  std::mutex mutex_;
  void* block_ = nullptr;
  size_t capacity_ = 0;
};

Arena& arena() {
  static Arena* instance = new Arena;  // outlives every tensor that points into it
  return *instance;
}

// ---------------------------------------------------------------------------------------------------- segment

struct Arguments {
  Tensor inputs, state, w_input;
  std::vector<Tensor> w_nodes;
  Tensor p_input, p_edges, output_weights;
  std::vector<int64_t> ops, sources;
  Tensor mask_x, mask_h;  // undefined: none
  int64_t batch_norm;
};

// Sizes are relied on below: what does not fit must not be read
void check(const Arguments& args) {
  const int64_t batch = args.inputs.size(1), width = args.inputs.size(2), n_weights = int64_t(args.w_nodes.size());
  const auto expect = [](const Tensor& tensor, std::vector<int64_t> shape, const char* name) {
    TORCH_CHECK(tensor.sizes() == IntArrayRef(shape), "recurrent cell: ", name, " is ", tensor.sizes(), ", expected ",
                IntArrayRef(shape));
  };
  expect(args.state, {batch, width}, "state");
  expect(args.w_input, {2 * width, 2 * width}, "w_input");
  for (const Tensor& weight : args.w_nodes) expect(weight, {width, 2 * width}, "a weight of w_nodes");
  if (args.mask_x.defined()) expect(args.mask_x, {batch, width}, "mask_x");
  if (args.mask_h.defined()) expect(args.mask_h, {batch, width}, "mask_h");
  const int64_t n_nodes = args.output_weights.numel() - 1;
  if (args.ops.empty()) {
    const int64_t n_edges = n_nodes * (n_nodes + 1) / 2;
    TORCH_CHECK(n_weights == n_nodes || n_weights == n_edges, "recurrent cell: ", n_weights,
                " weights in w_nodes, expected ", n_nodes, " or ", n_edges);
    expect(args.p_input, {K}, "p_input");
    expect(args.p_edges, {n_edges, K}, "p_edges");
    return;
  }
  const int64_t n_ops = int64_t(args.ops.size()), n_inputs = int64_t(args.sources.size());
  TORCH_CHECK(n_ops == n_nodes + 1 && n_inputs == n_nodes && n_weights == n_nodes,
              "recurrent cell: ", n_nodes, " nodes, but ", n_ops, " operations, ", n_inputs,
              " inputs and ", n_weights, " weights");
  for (int64_t op : args.ops) TORCH_CHECK(op >= 0 && op < K, "recurrent cell: operation ", op);
  for (int64_t node = 1; node <= n_nodes; ++node)
    TORCH_CHECK(args.sources[node - 1] >= 0 && args.sources[node - 1] < node, "recurrent cell: node ", node, " reads ",
                args.sources[node - 1]);
}

Tensor defined(const OptionalTensor& tensor) { return tensor.has_value() ? tensor->contiguous() : Tensor(); }

template <typename S>
class Segment {
 public:
  explicit Segment(const Arguments& arguments)
      : args(arguments),
        steps(args.inputs.size(0)),
        batch(args.inputs.size(1)),
        width(args.inputs.size(2)),
        plane(batch * width),
        blocks(batch),
        statistics(blocks, width),
        mean(width),
        slope(width),
        options(args.inputs.options()),
        mixture(args.ops.empty()),
        graph(mixture ? mixture_graph(args.output_weights.numel() - 1,
                                      int64_t(args.w_nodes.size()) != args.output_weights.numel() - 1)
                      : path_graph(args.ops, args.sources)),
        nodes(graph.n_nodes + 1) {
    const S* shares = args.output_weights.data_ptr<S>();
    output_weights.assign(shares, shares + nodes);
    if (mixture) {
      p_input = row_of(args.p_input.data_ptr<S>());
      for (int64_t row = 0; row < args.p_edges.size(0); ++row)
        p_edges.push_back(row_of(args.p_edges.data_ptr<S>() + row * K));
    }
    w_x = args.w_input.narrow(0, 0, width);
    w_h = args.w_input.narrow(0, width, width);
  }

  // hs (T, B, H), and the tape if it is kept
  std::vector<Tensor> forward(bool keep) {
    lay_tape(keep);
    project_inputs();
    std::vector<Panels<S>> weights;
    for (const auto& readers : graph.readers)
      weights.push_back(readers.empty() ? Panels<S>() : lmnas::side_by_side<S>(weights_read(readers)));
    const Panels<S> w_state = lmnas::side_by_side<S>({w_h});
    Tensor hs = at::empty({steps, batch, width}, options);
    Tensor masked = at::empty({batch, width}, options);
    const bool masks = args.mask_h.defined();
    const S* h = args.state.data_ptr<S>();
    for (int64_t t = 0; t < steps; ++t) {
      mask_state(h, masked);
      product(masks ? masked.data_ptr<S>() : h, width, w_state, input_product.data_ptr<S>() + t * 2 * plane, true);
      for (int64_t i = 0; i < nodes; ++i) {
        node_forward(i, t, h, masked.data_ptr<S>());
        if (reads(i)) product(masks ? masked.data_ptr<S>() : state(i, t), width, weights[i], moment(i, t), false);
      }
      S* out = hs.data_ptr<S>() + t * plane;
      output_forward(t, out);
      h = out;
    }
    if (!keep) return {hs};
    return {hs, tape};
  }

  // Gradients of inputs, state, w_input, p_input, p_edges, output_weights, then of w_nodes; undefined where not wanted
  std::vector<Tensor> backward(
      const Tensor& gradient, const Tensor& hs, const Tensor& kept, const std::array<bool, 7>& wants) {
    const auto [wants_inputs, wants_state, wants_w_input, wants_p_input, wants_p_edges, wants_outputs,
                wants_w_nodes] = wants;
    tape = kept;
    lay_tape(true, /*borrow=*/false);
    d_outputs.assign(nodes, 0.0);
    d_p.assign(mixture ? (p_edges.size() + 1) * K : 0, 0.0);
    wants_p = mixture && (wants_p_input || wants_p_edges);
    wants_output_weights = wants_outputs;

    d_states = at::zeros({nodes + 1, batch, width}, options);  // slot 0: of h before the step; slot 1 + i: of node i
    Tensor back = at::zeros({batch, width}, options);          // gradient that came through a product, unmasked
    Tensor dh = at::zeros({batch, width}, options);
    std::vector<Panels<S>> weights;
    for (const auto& readers : graph.readers)
      weights.push_back(readers.empty() ? Panels<S>() : lmnas::side_by_side_transposed<S>(weights_read(readers)));
    const Panels<S> w_state = lmnas::side_by_side_transposed<S>({w_h});
    for (int64_t t = steps - 1; t >= 0; --t) {
      output_backward(t, dh.data_ptr<S>(), back.data_ptr<S>(), gradient.data_ptr<S>() + t * plane,
                      hs.data_ptr<S>() + t * plane);
      const S* h = t == 0 ? args.state.data_ptr<S>() : hs.data_ptr<S>() + (t - 1) * plane;
      for (int64_t i = nodes - 1; i >= 0; --i) {
        if (reads(i)) product(moment(i, t), weights[i].depth, weights[i], back.data_ptr<S>(), false);
        node_backward(i, t, h, reads(i) ? back.data_ptr<S>() : nullptr);
      }
      if (t > 0 || wants_state)
        product(input_product.data_ptr<S>() + t * 2 * plane, 2 * width, w_state, back.data_ptr<S>(), false);
    }

    Tensor d_inputs, d_state, d_w_input, d_p_input, d_p_edges, d_shares;
    if (wants_state) d_state = initial_gradient(back);
    if (wants_inputs) {
      d_inputs = at::empty({steps, batch, width}, options);
      lmnas::multiply<S>(input_product.data_ptr<S>(), 2 * width, steps * batch, lmnas::side_by_side_transposed<S>({w_x}),
                         d_inputs.data_ptr<S>(), width, false);
      if (args.mask_x.defined()) d_inputs.mul_(args.mask_x);
    }
    if (wants_w_input) {
      d_w_input = at::empty({2 * width, 2 * width}, options);
      const S* d_product = input_product.data_ptr<S>();
      S* top = d_w_input.data_ptr<S>();
      lmnas::multiply_once<S>(over_time(args.inputs, args.mask_x), d_product, 2 * width, 2 * width, top, 2 * width, false);
      lmnas::multiply_once<S>(over_time(history(hs), args.mask_h), d_product, 2 * width, 2 * width,
                              top + 2 * width * width, 2 * width, false);
    }
    if (wants_p_input) d_p_input = to_tensor(d_p.data(), {K});
    if (wants_p_edges) d_p_edges = to_tensor(d_p.data() + K, {int64_t(p_edges.size()), K});
    if (wants_outputs) d_shares = to_tensor(d_outputs.data(), {nodes});
    std::vector<Tensor> result{d_inputs, d_state, d_w_input, d_p_input, d_p_edges, d_shares};
    if (wants_w_nodes) {
      std::vector<Tensor> d_w_nodes = weight_gradients();
      result.insert(result.end(), d_w_nodes.begin(), d_w_nodes.end());
    }
    return result;
  }

 private:
  static Mixture<S> row_of(const S* p) {
    Mixture<S> f{{p[0], p[1], p[2], p[3]}, S(0)};
    for (S weight : f.p) f.total += weight;
    return f;
  }

  bool reads(int64_t source) const { return !graph.readers[source].empty(); }
  // The product of a source at one time step
  S* moment(int64_t source, int64_t t) const {
    return products[source].data_ptr<S>() + (kept_all ? t : 0) * batch * products[source].size(2);
  }
  S* state(int64_t node, int64_t t) const {
    return states.data_ptr<S>() + (node * kept_steps + (kept_all ? t : 0)) * plane;
  }
  S* deviation(int64_t node, int64_t t) const {
    return deviations.data_ptr<S>() + ((kept_all ? t : 0) * nodes + node) * width;
  }
  // One block holds everything that backward needs; without a tape, one time step of it.
  void lay_tape(bool keep, bool borrow = true) {
    kept_all = keep;
    kept_steps = keep ? steps : 1;
    int64_t n_readers = 0;
    for (const auto& readers : graph.readers) n_readers += int64_t(readers.size());
    const int64_t per_step = 2 * plane * n_readers + nodes * plane + nodes * width;
    const int64_t count = steps * 2 * plane + kept_steps * per_step;
    if (borrow) tape = keep ? arena().borrow(count, options) : at::empty({count}, options);
    int64_t offset = 0;
    const auto take = [&](std::vector<int64_t> shape) {
      int64_t size = 1;
      for (int64_t extent : shape) size *= extent;
      Tensor part = tape.narrow(0, offset, size).view(shape);
      offset += size;
      return part;
    };
    input_product = take({steps, batch, 2 * width});
    products.clear();
    for (const auto& readers : graph.readers)
      products.push_back(take({kept_steps, batch, int64_t(readers.size()) * 2 * width}));
    states = take({nodes, kept_steps, batch, width});
    deviations = take({kept_steps, nodes, width});
  }

  Tensor masked_inputs() const {
    const Tensor x = args.mask_x.defined() ? at::mul(args.inputs, args.mask_x) : args.inputs;
    return x.reshape({steps * batch, width});
  }

  void project_inputs() {
    const Tensor x = masked_inputs();
    lmnas::multiply<S>(x.data_ptr<S>(), width, steps * batch, lmnas::side_by_side<S>({w_x}),
                       input_product.data_ptr<S>(), 2 * width, false);
  }

  // The weights of a source's readers, in the order of their slots
  std::vector<Tensor> weights_read(const std::vector<int64_t>& readers) const {
    std::vector<Tensor> parts;
    for (int64_t index : readers) parts.push_back(args.w_nodes[index]);
    return parts;
  }

  void product(const S* a, int64_t stride, const Panels<S>& weights, S* out, bool accumulate) const {
    lmnas::multiply<S>(a, stride, batch, weights, out, weights.columns, accumulate);
  }

  void mask_state(const S* h, Tensor& masked) const {
    if (!args.mask_h.defined()) return;
    const S* mask = args.mask_h.data_ptr<S>();
    S* out = masked.data_ptr<S>();
#pragma omp simd
    for (int64_t k = 0; k < plane; ++k) out[k] = h[k] * mask[k];
  }

  const Mixture<S>& weights_of(const Edge& edge) const { return edge.row < 0 ? p_input : p_edges[edge.row]; }

  struct EdgeRows {
    S* product;  // [c, a] of the first row
    int64_t stride;
    const S* source;
  };

  EdgeRows rows_of(const Edge& edge, int64_t t, const S* h) const {
    if (edge.source < 0) return {input_product.data_ptr<S>() + t * batch * 2 * width, 2 * width, h};
    return {moment(edge.source, t) + edge.slot * 2 * width, products[edge.source].size(2), state(edge.source, t)};
  }

  // State of node i from the products of its predecessors; times the mask into `masked`
  void node_forward(int64_t i, int64_t t, const S* h, S* masked) {
    const auto& edges = graph.into[i];
    std::vector<EdgeRows> rows;
    for (const Edge& edge : edges) rows.push_back(rows_of(edge, t, h));
    S* out = state(i, t);
    const int64_t elements = plane * int64_t(edges.size());
    const bool masks = args.mask_h.defined() && reads(i), normalises = args.batch_norm == NODES;
    blocks.over(elements, [&](int64_t block, int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; ++b)
        for (size_t e = 0; e < edges.size(); ++e) {
          const S* c = rows[e].product + b * rows[e].stride;
          const S* s = rows[e].source + b * width;
          S* to = out + b * width;
          if (!mixture)
            with_operation(edges[e].op, [&](auto op) {
              gate_row<true>(Operation<S, op>(), c, c + width, s, to, width);
            });
          else if (e == 0)
            gate_row<true>(weights_of(edges[e]), c, c + width, s, to, width);
          else
            gate_row<false>(weights_of(edges[e]), c, c + width, s, to, width);
        }
      if (normalises)
        statistics.moments(block, out, begin, end);
      else if (masks)
        multiply(out, args.mask_h.data_ptr<S>(), masked, begin, end);
    });
    if (!normalises) return;
    const S* deviations_of = normaliser(deviation(i, t));
    blocks.over(elements, [&](int64_t, int64_t begin, int64_t end) {
      normalise(out, deviations_of, begin, end);
      if (masks) multiply(out, args.mask_h.data_ptr<S>(), masked, begin, end);
    });
  }

  const S* normaliser(S* deviations_of) {
    statistics.normaliser(mean.data(), deviations_of);
    return deviations_of;
  }

  // Rows of x -> (x - mean) deviation
  void normalise(S* x, const S* deviations_of, int64_t begin, int64_t end) const {
    for (int64_t b = begin; b < end; ++b) {
      S* row = x + b * width;
#pragma omp simd
      for (int64_t h = 0; h < width; ++h) row[h] = (row[h] - mean[h]) * deviations_of[h];
    }
  }

  // Rows of g, the gradient of the normalised y, become those of what was normalised; `means` were taken before
  void normalise_backward(S* g, const S* y, const S* deviations_of, int64_t begin, int64_t end) const {
    for (int64_t b = begin; b < end; ++b) {
      S* dy = g + b * width;
      const S* out = y + b * width;
#pragma omp simd
      for (int64_t h = 0; h < width; ++h) dy[h] = deviations_of[h] * (dy[h] - mean[h] - out[h] * slope[h]);
    }
  }

  void multiply(const S* x, const S* mask, S* out, int64_t begin, int64_t end) const {
#pragma omp simd
    for (int64_t k = begin * width; k < end * width; ++k) out[k] = x[k] * mask[k];
  }

  // h = sum_n w_n s_n
  void output_forward(int64_t t, S* out) {
    const bool normalises = args.batch_norm == OUTPUT;
    blocks.over(plane * nodes, [&](int64_t block, int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; ++b) {
        S* row = out + b * width;
        std::fill_n(row, width, S(0));
        for (int64_t n = 0; n < nodes; ++n) {
          const S share = output_weights[n];
          if (share == S(0)) continue;
          const S* s = state(n, t) + b * width;
#pragma omp simd
          for (int64_t h = 0; h < width; ++h) row[h] += share * s[h];
        }
      }
      if (normalises) statistics.moments(block, out, begin, end);
    });
    if (!normalises) return;
    const S* deviations_of = normaliser(deviation(0, t));
    blocks.over(plane, [&](int64_t, int64_t begin, int64_t end) { normalise(out, deviations_of, begin, end); });
  }

  // g += what came through a product, behind the mask; null: nothing
  void add_back(S* g, const S* back, int64_t begin, int64_t end) const {
    if (back == nullptr) return;
    const S* mask = args.mask_h.defined() ? args.mask_h.data_ptr<S>() : nullptr;
#pragma omp simd
    for (int64_t k = begin * width; k < end * width; ++k) g[k] += mask ? back[k] * mask[k] : back[k];
  }

  // Gradient of h_t: what came from outside, and from step t + 1 beside and through its product; from it, of the states
  void output_backward(int64_t t, S* dh, const S* back, const S* outside, const S* h_t) {
    S* from_next = d_states.data_ptr<S>();
    const bool normalises = args.batch_norm == OUTPUT;
    const auto gather = [&](int64_t begin, int64_t end) {
#pragma omp simd
      for (int64_t k = begin * width; k < end * width; ++k) dh[k] = outside[k] + from_next[k];
      add_back(dh, back, begin, end);
    };
    if (normalises) {
      blocks.over(plane, [&](int64_t block, int64_t begin, int64_t end) {
        gather(begin, end);
        statistics.gradients(block, dh, h_t, begin, end);
      });
      statistics.means(mean.data(), slope.data());
    }
    blocks.over(plane * nodes, [&](int64_t, int64_t begin, int64_t end) {
      if (normalises)
        normalise_backward(dh, h_t, deviation(0, t), begin, end);
      else
        gather(begin, end);
      std::fill(from_next + begin * width, from_next + end * width, S(0));
      for (int64_t n = 0; n < nodes; ++n) {
        S* ds = from_next + (1 + n) * plane;
        const S share = output_weights[n];
#pragma omp simd
        for (int64_t k = begin * width; k < end * width; ++k) ds[k] = share * dh[k];
      }
    });
    if (!wants_output_weights) return;
    for (int64_t n = 0; n < nodes; ++n) {
      const S* s = state(n, t);
      double sum = 0;
#pragma omp simd reduction(+ : sum)
      for (int64_t k = 0; k < plane; ++k) sum += double(dh[k]) * s[k];
      d_outputs[n] += sum;
    }
  }

  // `back`: gradient of the masked state through its readers' product; null: nobody reads it
  void node_backward(int64_t i, int64_t t, const S* h, const S* back) {
    const auto& edges = graph.into[i];
    std::vector<EdgeRows> rows;
    for (const Edge& edge : edges) rows.push_back(rows_of(edge, t, h));
    S* g = d_states.data_ptr<S>() + (1 + i) * plane;
    const bool normalises = args.batch_norm == NODES;
    if (normalises) {
      blocks.over(plane, [&](int64_t block, int64_t begin, int64_t end) {
        add_back(g, back, begin, end);
        statistics.gradients(block, g, state(i, t), begin, end);
      });
      statistics.means(mean.data(), slope.data());
    }
    const int64_t n_p = int64_t(edges.size()) * K;
    block_d_p.assign(wants_p ? blocks.count * n_p : 0, 0.0);
    blocks.over(plane * int64_t(edges.size()), [&](int64_t block, int64_t begin, int64_t end) {
      if (normalises)
        normalise_backward(g, state(i, t), deviation(i, t), begin, end);
      else
        add_back(g, back, begin, end);
      std::vector<S> dp(wants_p ? K * width : 0);
      for (size_t e = 0; e < edges.size(); ++e) {
        std::fill(dp.begin(), dp.end(), S(0));
        for (int64_t b = begin; b < end; ++b) {
          S* c = rows[e].product + b * rows[e].stride;
          const S* s = rows[e].source + b * width;
          const S* dy = g + b * width;
          S* ds = d_states.data_ptr<S>() + (1 + edges[e].source) * plane + b * width;
          if (!mixture)
            with_operation(edges[e].op, [&](auto op) {
              gate_row_backward(Operation<S, op>(), dy, c, c + width, s, ds, width);
            });
          else if (wants_p)
            mixture_row_backward<true>(weights_of(edges[e]), dy, c, c + width, s, ds, dp.data(), width);
          else
            mixture_row_backward<false, S>(weights_of(edges[e]), dy, c, c + width, s, ds, nullptr, width);
        }
        if (!wants_p) continue;
        for (int64_t k = 0; k < K; ++k) {
          double sum = 0;
#pragma omp simd reduction(+ : sum)
          for (int64_t column = 0; column < width; ++column) sum += dp[k * width + column];
          block_d_p[block * n_p + int64_t(e) * K + k] = sum;
        }
      }
    });
    if (!wants_p) return;
    for (size_t e = 0; e < edges.size(); ++e)
      for (int64_t k = 0; k < K; ++k)
        for (int64_t block = 0; block < blocks.count; ++block)
          d_p[(1 + edges[e].row) * K + k] += block_d_p[block * n_p + int64_t(e) * K + k];
  }

  Tensor initial_gradient(const Tensor& back) const {
    const Tensor through = args.mask_h.defined() ? at::mul(back, args.mask_h) : back;
    return at::add(through, d_states.select(0, 0));
  }

  // (T, B, H), masked, as the left operand of a weight's gradient: one product over all time steps
  lmnas::LeftTiles<S> over_time(const Tensor& x, const Tensor& mask) const {
    return lmnas::transposed_tiles<S>(x.data_ptr<S>(), steps * batch, width, mask.defined() ? mask.data_ptr<S>() : nullptr,
                                      batch, options);
  }

  // h before every step
  Tensor history(const Tensor& hs) const {
    return at::cat({args.state.unsqueeze(0), hs.narrow(0, 0, steps - 1)}, 0);
  }

  std::vector<Tensor> weight_gradients() const {
    std::vector<Tensor> result(args.w_nodes.size());
    for (int64_t source = 0; source < nodes; ++source) {
      const auto& readers = graph.readers[source];
      if (readers.empty()) continue;
      const lmnas::LeftTiles<S> inputs = over_time(states.select(0, source), args.mask_h);
      const S* gradients = products[source].data_ptr<S>();
      for (size_t slot = 0; slot < readers.size(); ++slot) {
        Tensor& sum = result[readers[slot]];
        const bool more = sum.defined();
        if (!more) sum = at::empty({width, 2 * width}, options);
        lmnas::multiply_once<S>(inputs, gradients + int64_t(slot) * 2 * width, products[source].size(2), 2 * width,
                                sum.data_ptr<S>(), 2 * width, more);
      }
    }
    for (size_t index = 0; index < result.size(); ++index)
      if (!result[index].defined()) result[index] = at::zeros_like(args.w_nodes[index]);
    return result;
  }

  Tensor to_tensor(const double* values, IntArrayRef shape) const {
    Tensor result = at::empty(shape, options);
    std::transform(values, values + result.numel(), result.data_ptr<S>(), [](double v) { return S(v); });
    return result;
  }

  const Arguments& args;
  const int64_t steps, batch, width, plane;
  const Blocks blocks;
  Statistics statistics;
  std::vector<S> mean, slope;  // of columns: batch statistics of the pass at hand
  const at::TensorOptions options;
  const bool mixture;
  const Graph graph;
  const int64_t nodes;
  std::vector<S> output_weights;
  Mixture<S> p_input{};
  std::vector<Mixture<S>> p_edges;
  Tensor w_x, w_h;

  bool kept_all = false;
  int64_t kept_steps = 1;
  Tensor tape, input_product, states, deviations;
  std::vector<Tensor> products;

  Tensor d_states;
  std::vector<double> d_outputs, d_p, block_d_p;
  bool wants_p = false, wants_output_weights = false;
};

// ---------------------------------------------------------------------------------------------------- operators

Arguments arguments(
    const Tensor& inputs, const Tensor& state, const Tensor& w_input, TensorList w_nodes, const Tensor& p_input,
    const Tensor& p_edges, const Tensor& output_weights, IntArrayRef ops, IntArrayRef sources,
    const OptionalTensor& mask_x, const OptionalTensor& mask_h, int64_t batch_norm) {
  Arguments args{inputs.contiguous(), state.contiguous(), w_input.contiguous(), {}, p_input.contiguous(),
                 p_edges.contiguous(), output_weights.contiguous(), ops.vec(), sources.vec(), defined(mask_x),
                 defined(mask_h), batch_norm};
  for (const Tensor& weight : w_nodes) args.w_nodes.push_back(weight.contiguous());
  check(args);
  return args;
}

std::vector<Tensor> segment_forward(
    const Tensor& inputs, const Tensor& state, const Tensor& w_input, TensorList w_nodes, const Tensor& p_input,
    const Tensor& p_edges, const Tensor& output_weights, IntArrayRef ops, IntArrayRef sources,
    const OptionalTensor& mask_x, const OptionalTensor& mask_h, int64_t batch_norm, bool keep) {
  const Arguments args = arguments(inputs, state, w_input, w_nodes, p_input, p_edges, output_weights, ops, sources,
                                   mask_x, mask_h, batch_norm);
  if (inputs.scalar_type() == at::kDouble) return Segment<double>(args).forward(keep);
  return Segment<float>(args).forward(keep);
}

std::vector<Tensor> segment_backward(
    const Tensor& inputs, const Tensor& state, const Tensor& w_input, TensorList w_nodes, const Tensor& p_input,
    const Tensor& p_edges, const Tensor& output_weights, IntArrayRef ops, IntArrayRef sources,
    const OptionalTensor& mask_x, const OptionalTensor& mask_h, int64_t batch_norm, const Tensor& gradient,
    const Tensor& hs, const Tensor& tape, IntArrayRef wants) {
  const Arguments args = arguments(inputs, state, w_input, w_nodes, p_input, p_edges, output_weights, ops, sources,
                                   mask_x, mask_h, batch_norm);
  std::array<bool, 7> flags;
  std::transform(wants.begin(), wants.end(), flags.begin(), [](int64_t flag) { return flag != 0; });
  if (inputs.scalar_type() == at::kDouble)
    return Segment<double>(args).backward(gradient.contiguous(), hs, tape, flags);
  return Segment<float>(args).backward(gradient.contiguous(), hs, tape, flags);
}

}  // namespace

TORCH_LIBRARY(lmnas, library) {
  const char* cell =
      "(Tensor inputs, Tensor state, Tensor w_input, Tensor[] w_nodes, Tensor p_input, Tensor p_edges, "
      "Tensor output_weights, int[] ops, int[] sources, Tensor? mask_x, Tensor? mask_h, int batch_norm, ";
  library.def((std::string("segment_forward") + cell + "bool keep) -> Tensor[]").c_str());
  library.def((std::string("segment_backward") + cell +
               "Tensor gradient, Tensor hs, Tensor(a!) tape, int[] wants) -> Tensor[]")
                  .c_str());
}

TORCH_LIBRARY_IMPL(lmnas, CPU, library) {
  library.impl("segment_forward", &segment_forward);
  library.impl("segment_backward", &segment_backward);
}
