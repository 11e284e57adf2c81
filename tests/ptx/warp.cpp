// Instructions that lanes of a warp execute together: shuffles, votes, reductions, ldmatrix, mma.
#include <algorithm>

#include "machine.h"

namespace ptx {
namespace {

// Meets the lanes of the mask that is operand `i`; false: they wait.
bool meet_in(Step& step, size_t i, uint32_t (&members)[kWarp]) {
  step.get(i, members);
  if (!meet(step, members)) return false;
  step.get(i, members);  // of those that waited as well
  return true;
}

// shfl.sync.mode.b32 d|p, a, b, c, mask. c: segments in bits 8 to 12, and a clamp.
void shuffle(Step& step) {
  uint32_t members[kWarp], a[kWarp], b[kWarp], c[kWarp], r[kWarp];
  if (!meet_in(step, 4, members)) return;
  step.get(1, a);
  step.get(2, b);
  step.get(3, c);
  const std::string& mode = step.instruction.parts[2];
  uint32_t inside = 0;
  for (int l = 0; l < kWarp; ++l) {
    if (!step.active(l)) continue;
    const int segment = int(c[l] >> 8 & 31), clamp = int(c[l] & 31), by = int(b[l] & 31);
    const int most = (l & segment) | (clamp & ~segment), least = l & segment;
    int from;
    bool within;
    if (mode == "up") {
      from = l - by;
      within = from >= most;
    } else {
      from = mode == "down" ? l + by : mode == "bfly" ? l ^ by : least | (by & ~segment);
      within = from <= most;
    }
    if (!within) from = l;
    if (!(members[l] >> from & 1)) step.fail("reads lane " + std::to_string(from) + ", which is not in the mask", l);
    inside |= uint32_t(within) << l;
    r[l] = a[from];
  }
  const Operand& to = step.operand(0);
  step.put(to.is == Operand::Is::list ? to.list[0] : to, r);
  if (to.is == Operand::Is::list) step.set_predicate(to.list[1], inside);
}

// vote.sync.mode d, p, mask
void vote(Step& step) {
  uint32_t members[kWarp], r[kWarp], verdict = 0;
  if (!meet_in(step, 2, members)) return;
  const uint32_t p = step.predicate(step.operand(1));
  for (int l = 0; l < kWarp; ++l) {
    const uint32_t yes = p & members[l];
    r[l] = yes;
    const bool all = yes == members[l], none = yes == 0;
    const bool found = step.instruction.has("all") ? all : step.instruction.has("any") ? !none : all || none;  // uni
    verdict |= uint32_t(found) << l;
  }
  if (step.instruction.has("ballot")) return step.put(size_t(0), r);
  step.set_predicate(step.operand(0), verdict);
}

// match.any.sync.b32 d, a, mask: the lanes with the same value.
template <class T>
void match(Step& step) {
  uint32_t members[kWarp], r[kWarp] = {};
  T a[kWarp];
  if (!meet_in(step, 2, members)) return;
  step.get(1, a);
  for (int l = 0; l < kWarp; ++l)
    for (int other = 0; other < kWarp; ++other)
      if ((members[l] >> other & 1) && a[other] == a[l]) r[l] |= 1u << other;
  step.put(size_t(0), r);
}

// redux.sync.op d, a, mask
template <class T>
void reduce(Step& step) {
  uint32_t members[kWarp];
  T a[kWarp], r[kWarp];
  if (!meet_in(step, 2, members)) return;
  step.get(1, a);
  const Instruction& in = step.instruction;
  for (int l = 0; l < kWarp; ++l) {
    bool first = true;
    for (int other = 0; other < kWarp; ++other) {
      if (!(members[l] >> other & 1)) continue;
      const T v = a[other];
      r[l] = first           ? v
             : in.has("add") ? T(r[l] + v)
             : in.has("min") ? std::min(r[l], v)
             : in.has("max") ? std::max(r[l], v)
             : in.has("and") ? r[l] & v
             : in.has("or")  ? r[l] | v
                             : r[l] ^ v;
      first = false;
    }
  }
  step.put(size_t(0), r);
}

void active_mask(Step& step) {
  uint32_t r[kWarp];
  std::fill_n(r, kWarp, step.mask);
  step.put(size_t(0), r);
}

void warp_barrier(Step& step) {  // bar.warp.sync mask
  uint32_t members[kWarp];
  meet_in(step, 0, members);
}

// ---- matrices ------------------------------------------------------------------------------------------------------

// ldmatrix.x4: lane l names row l % 8 of matrix l / 8, 16 bytes. Register n of lane 4 g + t: [g, 2t] and [g, 2t + 1] of
// matrix n, or with .trans [2t, g] and [2t + 1, g].
void load_matrix(Step& step) {
  if (!meet_all(step)) return;
  uint64_t at[kWarp];
  step.addresses(step.operand(1), at);
  const Operand& to = step.operand(0);
  const bool transposed = step.instruction.has("trans"), generic = step.instruction.space == 0;
  for (size_t n = 0; n < to.list.size(); ++n) {
    uint16_t matrix[8][8];
    for (int row = 0; row < 8; ++row) {
      const int lane = int(n) * 8 + row;
      step.warp.block->shared.load(step, lane, generic ? at[lane] - kSharedWindow : at[lane], 16, matrix[row]);
    }
    uint32_t r[kWarp];
    for (int l = 0; l < kWarp; ++l) {
      const int g = l / 4, t = l % 4;
      const uint16_t low = transposed ? matrix[2 * t][g] : matrix[g][2 * t];
      const uint16_t high = transposed ? matrix[2 * t + 1][g] : matrix[g][2 * t + 1];
      r[l] = uint32_t(high) << 16 | low;
    }
    step.put(to.list[n], r);
  }
}

// Where element i of a lane's fragment lies, lane = 4 g + t: "Matrix Fragments for mma.m16n8k*" in the PTX manual.
struct Place {
  int row, column;
};
Place place_in_a(int lane, int i, bool narrow) {
  const int g = lane / 4, t = lane % 4;
  if (narrow) return {g + i / 2 % 2 * 8, 2 * t + i % 2 + i / 4 * 8};
  return {g + i % 2 * 8, t + i / 2 * 4};  // tf32
}
Place place_in_b(int lane, int i, bool narrow) {
  const int g = lane / 4, t = lane % 4;
  return {narrow ? 2 * t + i % 2 + i / 2 * 8 : t + i * 4, g};
}
Place place_in_d(int lane, int i) { return {lane / 4 + i / 2 * 8, lane % 4 * 2 + i % 2}; }

enum Element : uint32_t { kBfloat, kHalf, kTf32 };

// mma.sync.aligned.m16n8kK.row.col.D.A.B.C d, a, b, c. Products are exact; they are added in the order of k, each sum
// rounded to float. Hardware's order is its own.
void product(Step& step) {
  if (!meet_all(step)) return;
  ++counts.products;
  const uint32_t element = step.instruction.detail & 3, depth = step.instruction.detail >> 4;
  const bool narrow = element != kTf32, half_sums = step.instruction.detail & 8;
  float a[16][16], b[16][8], d[16][8];
  const auto values = [&](const Operand& list, int count, bool pairs, auto take) {
    for (int r = 0; r < count; ++r) {
      uint32_t bits[kWarp];
      step.get(list.list[size_t(r)], bits);
      for (int l = 0; l < kWarp; ++l) {
        if (!pairs) {
          take(l, r, bits_as<float>(bits[l]));
        } else {
          for (int i = 0; i < 2; ++i) {
            const uint16_t half = uint16_t(bits[l] >> 16 * i);
            take(l, 2 * r + i, element == kBfloat ? bfloat_to_float(half) : half_to_float(half));
          }
        }
      }
    }
  };
  values(step.operand(1), int(step.operand(1).list.size()), narrow, [&](int l, int i, float v) {
    const Place at = place_in_a(l, i, narrow);
    a[at.row][at.column] = narrow ? v : bits_as<float>(bits_as<uint32_t>(v) & ~0x1fffu);
  });
  values(step.operand(2), int(step.operand(2).list.size()), narrow, [&](int l, int i, float v) {
    const Place at = place_in_b(l, i, narrow);
    b[at.row][at.column] = narrow ? v : bits_as<float>(bits_as<uint32_t>(v) & ~0x1fffu);
  });
  values(step.operand(3), half_sums ? 2 : 4, half_sums, [&](int l, int i, float v) {
    const Place at = place_in_d(l, i);
    d[at.row][at.column] = v;
  });
  for (int i = 0; i < 16; ++i)
    for (uint32_t k = 0; k < depth; ++k)
      for (int j = 0; j < 8; ++j) d[i][j] = d[i][j] + a[i][k] * b[k][j];
  for (int r = 0; r < (half_sums ? 2 : 4); ++r) {
    uint32_t bits[kWarp];
    for (int l = 0; l < kWarp; ++l) {
      const auto at = [&](int i) {
        const Place p = place_in_d(l, i);
        return d[p.row][p.column];
      };
      bits[l] = half_sums ? uint32_t(double_to_half(double(at(2 * r + 1)))) << 16 | double_to_half(double(at(2 * r)))
                          : bits_as<uint32_t>(at(r));
    }
    step.put(step.operand(0).list[size_t(r)], bits);
  }
}

bool decode_product(Instruction& in) {
  struct Form {
    const char *shape, *element;
    uint32_t depth, kind;
  };
  static const Form forms[] = {{"m16n8k16", "bf16", 16, kBfloat}, {"m16n8k16", "f16", 16, kHalf},
                               {"m16n8k8", "bf16", 8, kBfloat},   {"m16n8k8", "f16", 8, kHalf},
                               {"m16n8k8", "tf32", 8, kTf32},     {"m16n8k4", "tf32", 4, kTf32}};
  const size_t n = in.parts.size();
  if (n != 10 && n != 9) return false;
  const std::string &d = in.parts[n - 4], &a = in.parts[n - 3], &b = in.parts[n - 2], &c = in.parts[n - 1];
  const bool half_sums = d == "f16" && c == "f16" && a == "f16";
  if (!in.has("row") || !in.has("col") || a != b || !(half_sums || (d == "f32" && c == "f32"))) return false;
  for (const Form& form : forms) {
    if (!in.has(form.shape) || a != form.element) continue;
    in.detail = form.kind | uint32_t(half_sums) << 3 | form.depth << 4;
    return (in.action = product);
  }
  return false;
}

}  // namespace

bool decode_warp(Instruction& in) {
  const std::string& name = in.parts[0];
  const bool sync = in.has("sync");
  if (name == "shfl" && sync) return (in.action = shuffle);
  if (name == "vote" && sync) return (in.action = vote);
  if (name == "match" && sync && in.has("any"))
    return (in.action = in.type.bits == 32 ? match<uint32_t> : match<uint64_t>);
  if (name == "redux" && sync && in.type.kind != 'f')
    return (in.action = in.type.kind == 's' ? reduce<int32_t> : reduce<uint32_t>);
  if (name == "activemask") return (in.action = active_mask);
  if (name == "bar" && in.has("warp")) return (in.action = warp_barrier);
  if (name == "ldmatrix" && in.has("m8n8") && in.has("b16")) return (in.action = load_matrix);
  if (name == "mma" && sync) return decode_product(in);
  return false;
}

}  // namespace ptx
