// Cross-entropy of a linear layer's outputs, which are never stored.
//
//   z[r][v] = cap(sum_k x[r][k] W[v][k] + b[v])       cap(z) = c tanh(z / c), or z
//   lse[r]  = ln sum_v e^z[r][v]
//   loss[r] = (1 - s) w[t] (lse - z[t]) + s / V sum_v w[v] (lse - z[v]) + z_loss lse^2      t: the row's target
//
//   dz[r][v] = g[r] (((1 - s) w[t] + s / V sum_v w[v] + 2 z_loss lse) p[v] - (1 - s) w[t] [v = t] - s / V w[v]) cap'
//   p[v] = e^(z[v] - top) / sum      cap' = 1 - (z / c)^2      g: gradient of the row's loss, over the mean's divisor
//   dx = dz W      dW = dz^T x      db = sum of dz's rows
//
// Forward: classes are gone through in chunks, whose W is packed and multiplied with all rows by linear_product.h; as
// each row of a group of panels is finished, its maximum (top) and its sum of e^(z - top) are all that is kept. After a
// chunk the groups are merged into the row's running ones. Of the first `keep` classes the e^(z - top of the group) are
// kept as well, rounded; once the row's top and sum are known, they become its probabilities.
// Backward: chunk of classes by chunk of rows dz is made from the probabilities, or anew from the product and the two
// numbers, and goes into the products for dx (which adds up over chunks of classes) and dW (over chunks of rows) while
// it is in the cache.
#pragma once
#include "../cross_entropy.h"

#include "linear_backward.h"

namespace handtuned::HANDTUNED_ISA {

// Of dz between the products: what they multiply.
template <class T>
using GradLogit = std::conditional_t<std::is_same_v<T, f16>, float, T>;

template <class T>
Accumulate<T> class_weight(const CrossEntropy& p, int64_t v) {
  if (!p.class_weight) return 1;
  return load_first(static_cast<const T*>(p.class_weight) + v, 1)[0];
}

// sum_v w[v], and what a mean is divided by.
template <class T>
double sum_of_weights(const CrossEntropy& p) {
  if (!p.class_weight) return double(p.classes);
  double sum = 0;
  for (int64_t v = 0; v < p.classes; ++v) sum += class_weight<T>(p, v);
  return sum;
}
template <class T>
double divisor(const CrossEntropy& p) {
  if (p.reduction != Reduction::mean) return 1;
  double sum = 0;
  for (int64_t r = 0; r < p.rows; ++r) sum += class_weight<T>(p, p.target[r]);
  return sum;
}

// The chunk of W from class v on, `classes` of them.
template <class T>
LinearPack chunk_of(const CrossEntropy& p, int64_t v, int64_t classes) {
  return {classes, p.in, p.dtype, static_cast<const T*>(p.weight) + v * p.weight_row, p.weight_row, p.packed_classes};
}

template <class T>
void gather(const CrossEntropy& p) {
  parallel_pieces(p.rows, p.rows * p.in < 1 << 16, [&](int64_t r) {
    __builtin_memcpy(static_cast<T*>(p.gathered) + r * p.in, row_of<T>(p.input, p.chosen[r]), p.in * sizeof(T));
  });
}

// z of n classes from v on, in place of the product's sums. cap' z-dependent parts are found from z itself.
template <class T>
HT_INLINE void finish_logits(const CrossEntropy& p, int64_t v, int64_t n, Accumulate<T>* z) {
  using A = Accumulate<T>;
  constexpr int L = kLanes<A>;
  if (p.bias) {
    const T* bias = static_cast<const T*>(p.bias) + v;
    for (int64_t i = 0; i < n; i += L) store(z + i, load(z + i) + load_first(bias + i, n - i));
  }
  if (p.softcap > 0) {
    const A cap = A(p.softcap), inverse = A(1 / p.softcap);
    for (int64_t i = 0; i < n; i += L) store(z + i, cap * tanh(load(z + i) * inverse));
  }
}

// Calls use(part, i) with four vectors' exponentials of z[i] - shift, over the panels that n classes reach into.
template <class A, class Use>
HT_INLINE void exponentials(const A* z, int64_t n, A shift, Use use) {
  constexpr int L = kLanes<A>;
  for (int64_t i = 0; i < n; i += 4 * L) {
    vec<A> part[4];
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) part[j] = load(z + i + j * L) - shift;
    exponential(part);
    use(part, i);
  }
}

// ---- forward --------------------------------------------------------------------------------------------------------

// Of a row and a group of classes: largest z, sum of e^(z - largest), sum of w z.
template <class A>
struct Partials {
  A *top, *sum, *weighted;  // each [groups][rows]
};

// The first `keep` exponentials go to kept.
template <class T>
void reduce_logits(const CrossEntropyForward& p, int64_t v, int64_t n, Accumulate<T>* z, Partials<Accumulate<T>> to,
                   int64_t at, T* kept, int64_t keep) {
  using A = Accumulate<T>;
  constexpr int L = kLanes<A>;
  constexpr A infinity = __builtin_inf();
  finish_logits<T>(p, v, n, z);
  if (p.label_smoothing > 0) {
    vec<A> sum = {};
    for (int64_t i = 0; i < n; i += L) {
      const vec<A> w = p.class_weight ? load_first(static_cast<const T*>(p.class_weight) + v + i, n - i) : vec<A>{} + 1;
      sum += w * load_first(z + i, n - i);
    }
    to.weighted[at] = sum_lanes(sum);
  }
  for (int64_t i = n; i % kLinearPanel; ++i) z[i] = -infinity;
  vec<A> top = broadcast(-infinity);
  for (int64_t i = 0; i < n; i += L) top = larger(load(z + i), top);
  A largest = -infinity;
  for (int i = 0; i < L; ++i) largest = larger(top[i], largest);
  vec<A> sum[4] = {};
  exponentials(z, n, largest > -infinity ? largest : A(0), [&](vec<A>(&part)[4], int64_t i) HT_LAMBDA {
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      sum[j] += part[j];
      if (const int64_t left = keep - i - j * L; left > 0) store_first(kept + i + j * L, part[j], left);
    }
  });
  to.top[at] = largest;
  to.sum[at] = sum_lanes((sum[0] + sum[1]) + (sum[2] + sum[3]));
}

// Groups into the running statistics of rows: sums are brought to the larger maximum.
template <class A>
void merge_partials(int64_t rows, int64_t groups, Partials<A> from, Partials<A> into, bool weighted) {
  constexpr int L = kLanes<A>;
  constexpr A infinity = __builtin_inf();
  for (int64_t r = 0; r < rows; r += L) {
    const int64_t n = rows - r;
    vec<A> top = load_first(into.top + r, n);
    for (int64_t g = 0; g < groups; ++g) top = larger(load_first(from.top + g * rows + r, n), top);
    const vec<A> shift = top > -infinity ? top : vec<A>{};
    vec<A> sum = load_first(into.sum + r, n) * exponential(load_first(into.top + r, n) - shift);
    for (int64_t g = 0; g < groups; ++g)
      sum += load_first(from.sum + g * rows + r, n) * exponential(load_first(from.top + g * rows + r, n) - shift);
    store_first(into.top + r, top, n);
    store_first(into.sum + r, sum, n);
    if (!weighted) continue;
    vec<A> total = {};
    for (int64_t g = 0; g < groups; ++g) total += load_first(from.weighted + g * rows + r, n);
    store_first(into.weighted + r, load_first(into.weighted + r, n) + total, n);
  }
}

// The exponentials that were kept, of groups with tops of their own, become probabilities.
template <class T>
void normalise_kept(const CrossEntropyForward& p, Partials<Accumulate<T>> found) {
  using A = Accumulate<T>;
  constexpr int L = kLanes<A>;
  parallel_pieces(p.rows, p.rows * p.keep < 1 << 15, [&](int64_t r) {
    const A* tops = static_cast<const A*>(p.tops) + r;
    for (int64_t v = 0; v < p.keep; v += p.chunk, tops += linear_panels(p.chunk) * p.rows) {
      const int64_t classes = least(p.chunk, p.classes - v), width = ProductCut(p.rows, classes).panels * kLinearPanel;
      for (int64_t c = 0; c < classes && v + c < p.keep; c += width) {
        // p[v] = e^(z - top of group) e^(top of group - top) / sum
        const vec<A> factor = exponential(broadcast(tops[c / width * p.rows] - found.top[r])) / found.sum[r];
        T* row = static_cast<T*>(p.kept) + p.chosen[r] * p.keep + v + c;
        const int64_t n = least(least(width, classes - c), p.keep - v - c);
        for (int64_t i = 0; i < n; i += L) store_first(row + i, load_first(row + i, n - i) * factor, n - i);
      }
    }
  });
}

// Losses from the rows' statistics, and their mean or sum.
template <class T>
void finish_losses(const CrossEntropyForward& p, Partials<Accumulate<T>> found, const Accumulate<T>* at_target) {
  using A = Accumulate<T>;
  const double s = p.label_smoothing, all = s > 0 ? sum_of_weights<T>(p) : 0;
  double sum = 0;
  for (int64_t r = 0; r < p.rows; ++r) {
    const double lse = found.top[r] + logarithm(double(found.sum[r]));
    double loss = (1 - s) * class_weight<T>(p, p.target[r]) * (lse - at_target[r]) + p.z_loss * lse * lse;
    if (s > 0) loss += s / double(p.classes) * (all * lse - found.weighted[r]);
    static_cast<A*>(p.top)[p.chosen[r]] = found.top[r];
    static_cast<A*>(p.sum)[p.chosen[r]] = found.sum[r];
    if (p.reduction == Reduction::none) static_cast<A*>(p.loss)[p.chosen[r]] = A(loss);
    sum += loss;
  }
  if (p.reduction != Reduction::none) *static_cast<A*>(p.loss) = A(sum / divisor<T>(p));
}

template <class T>
void cross_entropy_forward_in(const CrossEntropyForward& p) {
  using A = Accumulate<T>;
  const int64_t rows = p.rows, panels = linear_panels(p.chunk);
  A *running = static_cast<A*>(p.running), *partials = static_cast<A*>(p.partials), *at_target = running + 3 * rows;
  const Partials<A> total{running, running + rows, running + 2 * rows};
  Partials<A> of_groups{partials, partials + panels * rows, partials + 2 * panels * rows};
  for (int64_t r = 0; r < rows; ++r) total.top[r] = -__builtin_inf(), total.sum[r] = 0, total.weighted[r] = 0;
  gather<T>(p);
  const StridedRows x = rows_of(p.gathered, p.in);
  for (int64_t v = 0; v < p.classes && rows > 0; v += p.chunk) {
    const int64_t classes = least(p.chunk, p.classes - v);
    const ProductCut cut(rows, classes);
    if (v < p.keep) of_groups.top = static_cast<A*>(p.tops) + v / p.chunk * panels * rows;
    linear_pack_in<T>(chunk_of<T>(p, v, classes));
    product_of<T>(rows, classes, p.in, p.packed_classes, LeftRows<T>{x, p.in}, {},
                  [&](int64_t r, int64_t c, int64_t n, A* z) {
                    T* kept = nullptr;
                    if (v + c < p.keep) kept = static_cast<T*>(p.kept) + p.chosen[r] * p.keep + v + c;
                    const int64_t at = c / (cut.panels * kLinearPanel) * rows + r;
                    reduce_logits<T>(p, v + c, n, z, of_groups, at, kept, least(n, p.keep - v - c));
                    const int64_t t = p.target[r] - v - c;
                    if (0 <= t && t < n) at_target[r] = z[t];
                  });
    merge_partials<A>(rows, cut.groups, of_groups, total, p.label_smoothing > 0);
  }
  normalise_kept<T>(p, total);
  finish_losses<T>(p, total, at_target);
}

// ---- backward -------------------------------------------------------------------------------------------------------

// The factors of dz that depend on a row alone.
template <class A>
struct RowFactors {
  A top, of_exponential, of_probability, at_target, of_weights;
};

template <class T>
void find_factors(const CrossEntropyBackward& p) {
  using A = Accumulate<T>;
  const double scale = 1 / divisor<T>(p), s = p.label_smoothing, each = s / double(p.classes);
  const double all = s > 0 ? sum_of_weights<T>(p) : 0;
  const A* grad_loss = static_cast<const A*>(p.grad_loss);
  for (int64_t r = 0; r < p.rows; ++r) {
    const double g = grad_loss[p.reduction == Reduction::none ? p.chosen[r] : 0] * scale;
    const double own = (1 - s) * class_weight<T>(p, p.target[r]);
    const A top = static_cast<const A*>(p.top)[p.chosen[r]];
    const double sum = static_cast<const A*>(p.sum)[p.chosen[r]], lse = top + logarithm(sum);
    const double of_p = g * (own + each * all + 2 * p.z_loss * lse);
    static_cast<RowFactors<A>*>(p.factors)[r] = {top, A(of_p / sum), A(of_p), A(g * own), A(g * each)};
  }
}

// Columns v to v + n of a row of dz from grad, their g (..) p: the other terms and cap'.
template <class T>
void finish_grad_logits(const CrossEntropyBackward& p, const RowFactors<Accumulate<T>>& f, int64_t v, int64_t n,
                        int64_t target, const Accumulate<T>* z, Accumulate<T>* grad, GradLogit<T>* dz) {
  using A = Accumulate<T>;
  constexpr int L = kLanes<A>;
  if (f.of_weights != 0) {
    for (int64_t i = 0; i < n; i += L) {
      const vec<A> w = p.class_weight ? load_first(static_cast<const T*>(p.class_weight) + v + i, n - i) : vec<A>{} + 1;
      store(grad + i, load(grad + i) - f.of_weights * w);
    }
  }
  if (0 <= target - v && target - v < n) grad[target - v] -= f.at_target;
  if (p.softcap > 0) {
    const A inverse = A(1 / p.softcap);
    for (int64_t i = 0; i < n; i += L) {
      const vec<A> ratio = load(z + i) * inverse;
      store(grad + i, load(grad + i) * (1 - ratio * ratio));
    }
  }
  for (int64_t i = 0; i < n; i += L) store_first(dz + i, load(grad + i), n - i);
}

// The same from the product's sums.
template <class T>
void grad_logits_row(const CrossEntropyBackward& p, const RowFactors<Accumulate<T>>& f, int64_t v, int64_t n,
                     int64_t target, Accumulate<T>* z, GradLogit<T>* dz) {
  using A = Accumulate<T>;
  constexpr int L = kLanes<A>;
  finish_logits<T>(p, v, n, z);
  alignas(64) A grad[kMostColumns];
  exponentials(z, n, f.top, [&](vec<A>(&part)[4], int64_t i) HT_LAMBDA {
  // g (..) e^(z - top) / sum
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) store(grad + i + j * L, f.of_exponential * part[j]);
  });
  finish_grad_logits<T>(p, f, v, n, target, z, grad, dz);
}

// The same from probabilities that the forward kept; there is no softcap then.
template <class T>
void grad_logits_row(const CrossEntropyBackward& p, const RowFactors<Accumulate<T>>& f, int64_t v, int64_t n,
                     int64_t target, const T* probability, GradLogit<T>* dz) {
  using A = Accumulate<T>;
  constexpr int L = kLanes<A>;
  alignas(64) A grad[kMostColumns];
  for (int64_t i = 0; i < n; i += L) store(grad + i, f.of_probability * load_first(probability + i, n - i));
  finish_grad_logits<T>(p, f, v, n, target, nullptr, grad, dz);
}

// bias_sums += the columns' sums of dz [rows][pitch].
template <class T, class G = GradLogit<T>>
void add_columns(const G* dz, int64_t rows, int64_t classes, int64_t pitch, Accumulate<T>* sums) {
  using A = Accumulate<T>;
  constexpr int L = kLanes<A>;
  parallel_pieces((classes + kBiasColumns - 1) / kBiasColumns, rows * classes < 1 << 15, [&](int64_t piece) {
    const int64_t c = piece * kBiasColumns, n = least(kBiasColumns, classes - c);
    for (int64_t i = 0; i < n; i += L) {
      const G* column = dz + c + i;
      vec<A> sum = {}, some = {}, few = {};  // short sums first: they round less
      for (int64_t r = 0; r < rows; ++r) {
        few += load_first(column + r * pitch, n - i);
        if (r % 8 == 7 || r + 1 == rows) some += few, few = vec<A>{};
        if (r % 128 == 127 || r + 1 == rows) sum += some, some = vec<A>{};
      }
      store_first(sums + c + i, load_first(sums + c + i, n - i) + sum, n - i);
    }
  });
}

// n sums of a row, added to what `into` has of them unless they are the first.
template <class A>
void add_row(A* into, const A* sums, int64_t n, bool first) {
  constexpr int L = kLanes<A>;
  for (int64_t i = 0; i < n; i += L)
    store_first(into + i, first ? load(sums + i) : load(sums + i) + load_first(into + i, n - i), n - i);
}

// What a backward goes through, chunk by chunk.
template <class T>
struct EntropyGradients {
  using A = Accumulate<T>;
  using G = GradLogit<T>;
  const CrossEntropyBackward& p;
  const int64_t pitch = p.chunk;  // of dz's rows
  const int64_t packed_rows = linear_packed_numbers(p.dtype, p.in, least(kEntropyRows, p.rows));
  G* const dz = static_cast<G*>(p.grad_logits);
  const T* const x = static_cast<const T*>(p.gathered);

  T* packed_input(int64_t r) const { return static_cast<T*>(p.packed_input) + r / kEntropyRows * packed_rows; }

  bool kept(int64_t v, int64_t classes) const { return v + classes <= p.keep; }

  // dz of rows r .. r + n and classes v .. v + classes.
  void make_grad_logits(int64_t r, int64_t n, int64_t v, int64_t classes) const {
    const auto* factors = static_cast<const RowFactors<A>*>(p.factors) + r;
    if (kept(v, classes)) {
      parallel_pieces(n, n * classes < 1 << 15, [&](int64_t i) {
        const T* row = static_cast<const T*>(p.kept) + p.chosen[r + i] * p.keep + v;
        for (int64_t c = 0; c < classes; c += kMostColumns)
          grad_logits_row<T>(p, factors[i], v + c, least(kMostColumns, classes - c), p.target[r + i], row + c,
                             dz + i * pitch + c);
      });
      return;
    }
    product_of<T>(n, classes, p.in, p.packed_classes, LeftRows<T>{rows_of(x + r * p.in, p.in), p.in}, {},
                  [&](int64_t i, int64_t c, int64_t wide, A* z) {
                    grad_logits_row<T>(p, factors[i], v + c, wide, p.target[r + i], z, dz + i * pitch + c);
                  });
  }

  // dx[r .. r + n] += dz W
  void add_grad_input(int64_t r, int64_t n, bool first, int64_t classes) const {
    product_of<T>(n, p.in, classes, p.packed_weight, LeftRows<G>{rows_of(dz, pitch), classes}, {},
                  [&](int64_t i, int64_t c, int64_t wide, A* sums) {
                    add_row(static_cast<A*>(p.input_sums) + (r + i) * p.in + c, sums, wide, first);
                  });
  }

  // dW[v .. v + classes] += dz^T x; after the last rows it is rounded to its place.
  void add_grad_weight(int64_t r, int64_t n, int64_t v, int64_t classes) const {
    const bool first = r == 0, last = r + n == p.rows;
    const StridedRows grads = rows_of(dz, pitch);
    product_of<T>(classes, p.in, n, packed_input(r), LeftColumns<G>{grads, n}, {},
                  [&](int64_t i, int64_t c, int64_t wide, A* sums) {
                    A* sum = static_cast<A*>(p.weight_sums) + i * p.in + c;
                    if (last && !first) add_row(sums, sum, wide, false);
                    last ? store_row<T>(p.grad_weight, p.in, v + i, c, wide, sums) : add_row(sum, sums, wide, first);
                  });
  }
};

// dx's sums, rounded, to the rows that they belong to.
template <class T>
void scatter(const CrossEntropyBackward& p) {
  using A = Accumulate<T>;
  constexpr int L = kLanes<A>;
  parallel_pieces(p.rows, p.rows * p.in < 1 << 16, [&](int64_t r) {
    const A* sums = static_cast<const A*>(p.input_sums) + r * p.in;
    T* row = static_cast<T*>(p.grad_input) + p.chosen[r] * p.in;
    for (int64_t i = 0; i < p.in; i += L) store_first(row + i, load_first(sums + i, p.in - i), p.in - i);
  });
}

template <class T>
void cross_entropy_backward_in(const CrossEntropyBackward& p) {
  using A = Accumulate<T>;
  find_factors<T>(p);
  gather<T>(p);
  const EntropyGradients<T> parts{p};
  for (int64_t r = 0; r < p.rows && p.grad_weight; r += kEntropyRows)
    pack_all_steps<T>(rows_of(parts.x + r * p.in, p.in), p.in, least(kEntropyRows, p.rows - r), parts.packed_input(r));
  for (int64_t v = 0; v < p.classes; v += p.chunk) {
    const int64_t classes = least(p.chunk, p.classes - v);
    const LinearPack own = chunk_of<T>(p, v, classes);
    if (!parts.kept(v, classes)) linear_pack_in<T>(own);
    if (p.grad_input) pack_all_steps<T>(rows_of(own.weight, p.weight_row), p.in, classes, p.packed_weight);
    A* bias = static_cast<A*>(p.bias_sums);
    if (p.grad_bias) __builtin_memset(bias, 0, classes * sizeof(A));
    for (int64_t r = 0; r < p.rows; r += kEntropyRows) {
      const int64_t n = least(kEntropyRows, p.rows - r);
      parts.make_grad_logits(r, n, v, classes);
      if (p.grad_bias) add_columns<T>(parts.dz, n, classes, parts.pitch, bias);
      if (p.grad_input) parts.add_grad_input(r, n, v == 0, classes);
      if (p.grad_weight) parts.add_grad_weight(r, n, v, classes);
    }
    if (p.grad_bias) store_row<T>(p.grad_bias, p.classes, 0, v, classes, bias);
  }
  if (p.grad_input) scatter<T>(p);
}

}  // namespace handtuned::HANDTUNED_ISA
