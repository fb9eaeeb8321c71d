// Matrix products of the recurrent cell and of the softmax layer, exact in the type they are given.
//
// The cell multiplies by the same weights at every time step, with few rows. A library arranges the weights anew in each
// call and leaves its arrangement behind; here they are arranged once a segment. The result of an element is one chain of
// fused multiply-adds per DEPTH rows of the right operand, so it depends neither on threads nor on how the work is cut.
//
// Right operands lie in panels: TILE_COLUMNS columns (the last panel fewer, in whole vectors), each panel depth by depth.
// The inner loop holds TILE_ROWS x TILE_COLUMNS sums in registers.

#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <vector>

namespace lmnas {

using at::Tensor;

#if defined(__AVX512F__)
constexpr int64_t VECTOR_BYTES = 64, TILE_ROWS = 8;
#elif defined(__x86_64__)
constexpr int64_t VECTOR_BYTES = 32, TILE_ROWS = 4;
#else
constexpr int64_t VECTOR_BYTES = 16, TILE_ROWS = 8;
#endif
constexpr int64_t TILE_VECTORS = 3;
constexpr int64_t DEPTH = 384;       // a panel of so many rows stays in the second-level cache
constexpr int64_t BLOCK_ROWS = 128;  // rows of the left operand to a piece of work
constexpr int64_t AHEAD = 16;        // depths between a prefetch and its use

template <typename S>
constexpr int64_t LANES = VECTOR_BYTES / int64_t(sizeof(S));
template <typename S>
constexpr int64_t TILE_COLUMNS = TILE_VECTORS * LANES<S>;

inline int64_t pieces(int64_t whole, int64_t part) { return (whole + part - 1) / part; }

// The columns of panel `index`, rounded up to whole vectors
template <typename S>
int64_t panel_width(int64_t columns, int64_t index) {
  const int64_t left = columns - index * TILE_COLUMNS<S>;
  return std::min(TILE_COLUMNS<S>, pieces(left, LANES<S>) * LANES<S>);
}

// run(job) for all jobs, each taken by the next free thread: others may be computing on this machine
template <typename Run>
void each(int64_t count, Run run) {
  const int64_t threads = std::min<int64_t>(count, at::in_parallel_region() ? 1 : at::get_num_threads());
  std::atomic<int64_t> next{0};
  at::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    for (int64_t job = next++; job < count; job = next++) run(job);
  });
}

// ---------------------------------------------------------------------------------------------------- tiles

// out (rows, columns) += a (rows, depth) panel. Left operand: element (r, k) at a[r * row_step + k * depth_step].
template <int64_t rows, int64_t vectors, bool packed_left, typename S>
void tile(const S* a, int64_t row_step, const S* panel, int64_t depth, S* out, int64_t stride, int64_t columns) {
  typedef S Vector __attribute__((vector_size(VECTOR_BYTES)));
  constexpr int64_t WIDTH = vectors * LANES<S>;
  Vector sums[rows][vectors];
#pragma GCC unroll 8
  for (int64_t r = 0; r < rows; ++r)
#pragma GCC unroll 3
    for (int64_t v = 0; v < vectors; ++v) sums[r][v] = Vector{};
  for (int64_t k = 0; k < depth; ++k) {
    Vector right[vectors];
#pragma GCC unroll 3
    for (int64_t v = 0; v < vectors; ++v) {
      std::memcpy(&right[v], panel + k * WIDTH + v * LANES<S>, VECTOR_BYTES);
      __builtin_prefetch(panel + (k + AHEAD) * WIDTH + v * LANES<S>);
    }
#pragma GCC unroll 8
    for (int64_t r = 0; r < rows; ++r) {
      const S left = packed_left ? a[k * TILE_ROWS + r] : a[r * row_step + k];
#pragma GCC unroll 3
      for (int64_t v = 0; v < vectors; ++v) sums[r][v] += left * right[v];
    }
  }
  if (columns == WIDTH) {
#pragma GCC unroll 8
    for (int64_t r = 0; r < rows; ++r)
#pragma GCC unroll 3
      for (int64_t v = 0; v < vectors; ++v) {
        Vector before;
        std::memcpy(&before, out + r * stride + v * LANES<S>, VECTOR_BYTES);
        before += sums[r][v];
        std::memcpy(out + r * stride + v * LANES<S>, &before, VECTOR_BYTES);
      }
    return;
  }
#pragma GCC unroll 8
  for (int64_t r = 0; r < rows; ++r) {
    S row[WIDTH];
#pragma GCC unroll 3
    for (int64_t v = 0; v < vectors; ++v) std::memcpy(row + v * LANES<S>, &sums[r][v], VECTOR_BYTES);
    for (int64_t c = 0; c < columns; ++c) out[r * stride + c] += row[c];
  }
}

template <int64_t vectors, bool packed_left, typename S>
void tile_of_rows(
    int64_t rows, const S* a, int64_t row_step, const S* panel, int64_t depth, S* out, int64_t stride, int64_t columns) {
  switch (rows) {
    case 1: return tile<1, vectors, packed_left>(a, row_step, panel, depth, out, stride, columns);
    case 2: return tile<2, vectors, packed_left>(a, row_step, panel, depth, out, stride, columns);
    case 3: return tile<3, vectors, packed_left>(a, row_step, panel, depth, out, stride, columns);
    case 4: return tile<4, vectors, packed_left>(a, row_step, panel, depth, out, stride, columns);
    case 5: return tile<std::min<int64_t>(5, TILE_ROWS), vectors, packed_left>(a, row_step, panel, depth, out, stride, columns);
    case 6: return tile<std::min<int64_t>(6, TILE_ROWS), vectors, packed_left>(a, row_step, panel, depth, out, stride, columns);
    case 7: return tile<std::min<int64_t>(7, TILE_ROWS), vectors, packed_left>(a, row_step, panel, depth, out, stride, columns);
    default: return tile<TILE_ROWS, vectors, packed_left>(a, row_step, panel, depth, out, stride, columns);
  }
}

template <bool packed_left, typename S>
void tile_of(
    int64_t rows, const S* a, int64_t row_step, const S* panel, int64_t width, int64_t depth, S* out, int64_t stride,
    int64_t columns) {
  if (width == 3 * LANES<S>)
    tile_of_rows<3, packed_left>(rows, a, row_step, panel, depth, out, stride, columns);
  else if (width == 2 * LANES<S>)
    tile_of_rows<2, packed_left>(rows, a, row_step, panel, depth, out, stride, columns);
  else
    tile_of_rows<1, packed_left>(rows, a, row_step, panel, depth, out, stride, columns);
}

// Rows [begin, end) in tiles of nearly equal height
template <typename S>
void tiles(
    const S* a, int64_t row_step, int64_t begin, int64_t end, const S* panel, int64_t width, int64_t depth, S* out,
    int64_t stride, int64_t columns) {
  const int64_t height = pieces(end - begin, pieces(end - begin, TILE_ROWS));
  for (int64_t r = begin; r < end; r += height)
    tile_of<false>(std::min(height, end - r), a + r * row_step, row_step, panel, width, depth, out + r * stride, stride,
                   columns);
}

// ---------------------------------------------------------------------------------------------------- panels

// A right operand W (depth, columns), arranged
template <typename S>
struct Panels {
  Tensor storage;
  int64_t depth = 0, columns = 0;

  bool defined() const { return storage.defined(); }
  int64_t count() const { return pieces(columns, TILE_COLUMNS<S>); }
  S* panel(int64_t index) const { return storage.data_ptr<S>() + index * depth * TILE_COLUMNS<S>; }
};

// One panel of rows [first, first + depth) of W, whose element (k, c) is at w[k * row_step + c * column_step]
template <typename S>
void arrange(
    const S* w, int64_t row_step, int64_t column_step, int64_t depth, int64_t columns, int64_t width, S* panel) {
  if (column_step == 1) {
    for (int64_t k = 0; k < depth; ++k) {
      const S* row = w + k * row_step;
      S* to = panel + k * width;
      if (columns == TILE_COLUMNS<S>) {
        std::memcpy(to, row, TILE_COLUMNS<S> * sizeof(S));
      } else {
        std::memcpy(to, row, columns * sizeof(S));
        std::fill(to + columns, to + width, S(0));
      }
    }
    return;
  }
  constexpr int64_t STRIP = 16;  // a line of the cache at a time
  for (int64_t from = 0; from < depth; from += STRIP) {
    const int64_t to = std::min(from + STRIP, depth);
    for (int64_t c = 0; c < columns; ++c)
      for (int64_t k = from; k < to; ++k) panel[k * width + c] = w[k * row_step + c * column_step];
    for (int64_t c = columns; c < width; ++c)
      for (int64_t k = from; k < to; ++k) panel[k * width + c] = S(0);
  }
}

template <typename S>
Panels<S> new_panels(int64_t depth, int64_t columns, const at::TensorOptions& options) {
  return {at::empty({depth * pieces(columns, LANES<S>) * LANES<S>}, options), depth, columns};
}

// Several matrices of one depth side by side, or below one another: W = [w_0 w_1 ...], all (depth, columns) of one size
template <typename S>
Panels<S> side_by_side(const std::vector<Tensor>& parts) {
  const int64_t depth = parts[0].size(0), each = parts[0].size(1);
  Panels<S> result = new_panels<S>(depth, each * int64_t(parts.size()), parts[0].options());
  at::parallel_for(0, result.count(), 1, [&](int64_t from, int64_t to) {
    for (int64_t index = from; index < to; ++index) {
      const int64_t width = panel_width<S>(result.columns, index), first = index * TILE_COLUMNS<S>;
      const int64_t columns = std::min(TILE_COLUMNS<S>, result.columns - first);
      S* panel = result.panel(index);
      if (columns < width)
        for (int64_t k = 0; k < depth; ++k) std::fill(panel + k * width + columns, panel + (k + 1) * width, S(0));
      for (int64_t c = 0; c < columns;) {  // a panel may lie across a seam
        const int64_t part = (first + c) / each, inside = (first + c) % each;
        const int64_t run = std::min(columns - c, each - inside);
        const S* w = parts[part].data_ptr<S>() + inside;
        for (int64_t k = 0; k < depth; ++k) std::memcpy(panel + k * width + c, w + k * each, run * sizeof(S));
        c += run;
      }
    }
  });
  return result;
}

// The transpose of [w_0 w_1 ...]
template <typename S>
Panels<S> side_by_side_transposed(const std::vector<Tensor>& parts) {
  const int64_t columns_all = parts[0].size(0), each = parts[0].size(1);
  Panels<S> result = new_panels<S>(each * int64_t(parts.size()), columns_all, parts[0].options());
  const int64_t n_parts = int64_t(parts.size());
  at::parallel_for(0, result.count() * n_parts, 1, [&](int64_t from, int64_t to) {
    for (int64_t job = from; job < to; ++job) {
      const int64_t index = job / n_parts, part = job % n_parts;
      const int64_t width = panel_width<S>(columns_all, index), first = index * TILE_COLUMNS<S>;
      arrange<S>(parts[part].data_ptr<S>() + first * each, 1, each, each,
                 std::min(TILE_COLUMNS<S>, columns_all - first), width, result.panel(index) + part * each * width);
    }
  });
  return result;
}

// ---------------------------------------------------------------------------------------------------- products

// out (rows, columns) = a (rows, depth) W, or += it; both by rows, `a_stride` and `stride` apart
template <typename S>
void multiply(
    const S* a, int64_t a_stride, int64_t rows, const Panels<S>& w, S* out, int64_t stride, bool accumulate) {
  const int64_t count = w.count(), threads = at::get_num_threads();
  int64_t height = BLOCK_ROWS;
  while (height > 2 * TILE_ROWS && count * pieces(rows, height) < 16 * threads) height /= 2;
  const int64_t blocks = pieces(rows, height);
  each(count * blocks, [&](int64_t job) {
    const int64_t index = job / blocks, begin = job % blocks * height, end = std::min(begin + height, rows);
    const int64_t width = panel_width<S>(w.columns, index), first = index * TILE_COLUMNS<S>;
    const int64_t columns = std::min(TILE_COLUMNS<S>, w.columns - first);
    if (!accumulate)
      for (int64_t r = begin; r < end; ++r) std::fill_n(out + r * stride + first, columns, S(0));
    for (int64_t k = 0; k < w.depth; k += DEPTH)
      tiles<S>(a + k, a_stride, begin, end, w.panel(index) + k * width, width, std::min(DEPTH, w.depth - k), out + first,
               stride, columns);
  });
}

template <typename S>
void multiply(const Tensor& a, const Panels<S>& w, Tensor& out, bool accumulate) {
  multiply<S>(a.data_ptr<S>(), a.size(1), a.size(0), w, out.data_ptr<S>(), out.size(1), accumulate);
}

// The transpose of a (depth, rows), arranged as a left operand: TILE_ROWS rows at a time, depth by depth. What lies beyond
// the last row is never read.
template <typename S>
struct LeftTiles {
  Tensor storage;
  int64_t depth = 0, rows = 0;
};

// Row k of a is multiplied by row k % period of `mask` (period, rows), if there is one
template <typename S>
LeftTiles<S> transposed_tiles(const S* a, int64_t depth, int64_t rows, const S* mask, int64_t period,
                              const at::TensorOptions& options) {
  const int64_t count = pieces(rows, TILE_ROWS);
  LeftTiles<S> result{at::empty({count * depth * TILE_ROWS}, options), depth, rows};
  S* tiles = result.storage.template data_ptr<S>();
  constexpr int64_t STRIP = 64;
  at::parallel_for(0, pieces(depth, STRIP), 1, [&](int64_t from, int64_t to) {
    for (int64_t k = from * STRIP; k < std::min(to * STRIP, depth); ++k) {
      const S* row = a + k * rows;
      const S* factor = mask == nullptr ? nullptr : mask + k % period * rows;
      for (int64_t tile = 0; tile < count; ++tile) {
        S* out = tiles + (tile * depth + k) * TILE_ROWS;
        const int64_t first = tile * TILE_ROWS, height = std::min(TILE_ROWS, rows - first);
        if (height < TILE_ROWS || factor != nullptr)
          for (int64_t r = 0; r < height; ++r) out[r] = factor == nullptr ? row[first + r] : row[first + r] * factor[first + r];
        else
          std::memcpy(out, row + first, TILE_ROWS * sizeof(S));
      }
    }
  });
  return result;
}

// out (rows, columns) = a b, or += it, for b (depth, columns) by rows, which is arranged piece by piece: a weight's
// gradient, where a is the transpose of what the weight multiplied
template <typename S>
void multiply_once(const LeftTiles<S>& a, const S* b, int64_t b_stride, int64_t columns_all, S* out, int64_t stride,
                   bool accumulate) {
  const int64_t count = pieces(columns_all, TILE_COLUMNS<S>), threads = at::get_num_threads();
  int64_t height = pieces(a.rows, TILE_ROWS) * TILE_ROWS;
  while (height > 8 * TILE_ROWS && pieces(a.rows, height) * count < 8 * threads)
    height = pieces(height / 2, TILE_ROWS) * TILE_ROWS;
  const int64_t blocks = pieces(a.rows, height);
  each(blocks * count, [&](int64_t job) {
    const int64_t index = job / blocks, begin = job % blocks * height, end = std::min(begin + height, a.rows);
    const int64_t width = panel_width<S>(columns_all, index), first = index * TILE_COLUMNS<S>;
    const int64_t columns = std::min(TILE_COLUMNS<S>, columns_all - first);
    std::vector<S> piece(TILE_COLUMNS<S> * (DEPTH + AHEAD));
    if (!accumulate)
      for (int64_t r = begin; r < end; ++r) std::fill_n(out + r * stride + first, columns, S(0));
    for (int64_t k = 0; k < a.depth; k += DEPTH) {
      const int64_t depth = std::min(DEPTH, a.depth - k);
      arrange<S>(b + k * b_stride + first, b_stride, 1, depth, columns, width, piece.data());
      for (int64_t r = begin; r < end; r += TILE_ROWS)
        tile_of<true>(std::min(TILE_ROWS, end - r), a.storage.template data_ptr<S>() + r * a.depth + k * TILE_ROWS, 0,
                      piece.data(), width, depth, out + r * stride + first, stride, columns);
    }
  });
}

}  // namespace lmnas
