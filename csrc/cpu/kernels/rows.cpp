// Row gathers of combine, its backward and the backward of dispatch; see rows.h.
//
// Every sum runs in an order fixed by D and K alone: over k ascending for y, and for dot products in the
// lanes of lanes.h, whatever the register width. D is walked in tiles that stay in the first-level cache.
#include "cpu/kernels/rows.h"

#include "cpu/kernels/lanes.h"
#include "cpu/kernels/vector.h"

namespace glam::cpu::GLAM_ISA {
namespace {

constexpr int64_t kTile = 512;  // elements of D summed at a time: 4 KB of doubles

inline float load(float value) { return value; }
inline double load(double value) { return value; }
inline float load(Bf16 bits) { return bf16_to_float(bits); }

inline void store(float value, float* out) { *out = value; }
inline void store(double value, double* out) { *out = value; }
inline void store(float value, Bf16* out) { *out = float_to_bf16(value); }

template <class Row, class Scalar>
void combine(const Row* rows_RD, const SumOf<Row>* gates_TK, const int32_t* row_of_choice_TK, int64_t begin,
             int64_t end, int64_t K, int64_t D, Scalar* y_TD) {
  using Sum = SumOf<Row>;
  Sum sums[kTile];
  for (int64_t t = begin; t < end; ++t) {
    for (int64_t d = 0; d < D; d += kTile) {
      const int64_t width = D - d < kTile ? D - d : kTile;
      for (int64_t i = 0; i < width; ++i) sums[i] = Sum(0);
      for (int64_t choice = t * K; choice < (t + 1) * K; ++choice) {
        if (row_of_choice_TK[choice] < 0) continue;
        const Row* const row = rows_RD + row_of_choice_TK[choice] * D + d;
        const Sum gate = gates_TK ? gates_TK[choice] : Sum(1);
        for (int64_t i = 0; i < width; ++i) sums[i] += gate * load(row[i]);
      }
      Scalar* const y = y_TD + t * D + d;
      for (int64_t i = 0; i < width; ++i) store(sums[i], y + i);
    }
  }
}

template <class Scalar>
void combine_backward(const Scalar* grad_y_TD, const Scalar* rows_RD, const SumOf<Scalar>* gates_TK,
                      const int32_t* choice_of_row_R, int64_t begin, int64_t end, int64_t K, int64_t D,
                      Scalar* grad_rows_RD, SumOf<Scalar>* grad_gates_TK) {
  for (int64_t r = begin; r < end; ++r) {
    Scalar* const grad_row = grad_rows_RD + r * D;
    const int32_t choice = choice_of_row_R[r];
    if (choice < 0) {
      for (int64_t d = 0; d < D; ++d) grad_row[d] = Scalar(0);
      continue;
    }
    const Scalar* const grad_y = grad_y_TD + choice / K * D;
    const SumOf<Scalar> gate = gates_TK[choice];
    for (int64_t d = 0; d < D; ++d) store(gate * load(grad_y[d]), grad_row + d);
    const Scalar* const row = rows_RD + r * D;
    LaneSums<SumOf<Scalar>> dot;
    dot.add(D, [&](int64_t d) { return load(row[d]) * load(grad_y[d]); });
    grad_gates_TK[choice] = dot.total();
  }
}

template <class Scalar>
constexpr RowFunctions<Scalar> functions() {
  return {&combine<Scalar, Scalar>, &combine<SumOf<Scalar>, Scalar>, &combine_backward<Scalar>};
}

}  // namespace

extern const RowTable row_table = {functions<float>(), functions<double>(), functions<Bf16>()};

}  // namespace glam::cpu::GLAM_ISA
