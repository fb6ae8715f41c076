// y = x W^T (+ b): a prepacked weight, rows of activations that are rounded once, and a thread's share of the product.
//
// Callers distribute [0, linear_blocks) over their threads. Nothing here allocates memory, starts threads or depends on torch.
//
// Layout of a weight. Rows come in blocks of 16, one row per 32-bit lane; columns in groups (those that share a scale), each
// padded to a multiple of 8. codes[block][group][word][16 lanes], a word holding consecutive columns of its lane's row:
//   U4        8 columns: byte j has column j in its low half and column 4 + j in its high half
//   U8        4 columns, byte j column j
//   BFloat16  2 columns, the first in the low half
//   Float32   1 column
//   Planes    codes of 8 bits as two planes of 4, c = 16 h + l: all of h in the layout of U4, then all of l
//   HighPlane the same memory, of which only h is read, with 16 h + 8 for every code: an approximation of the weight at half
//   the bytes
// Float kinds have one group. Padding (rows past the last, columns past a group) does not affect the result.
//
// A row of y depends on its row of x only: it is bitwise independent of m, the number of threads and the other rows.
#pragma once
#include <cstdint>

namespace qk {

enum WeightKind : int32_t {
  kWeightFloat32 = 0, kWeightBFloat16 = 1, kWeightU4 = 2, kWeightU8 = 3, kWeightPlanes = 4, kWeightHighPlane = 5
};

struct Linear {          // filled in Python through ctypes (kernels/cpu/layout.py); plain pointers, all owned elsewhere
  const void* codes;     // 64-byte aligned
  const void* scales;    // [block][group][16] of `scale_dtype`; null for float kinds
  const uint8_t* zeros;  // [block][group][16], or null if all are `zero_code`
  const float* bias;     // [rows], or null
  int64_t rows, columns; // N, K of the model
  int64_t group;         // columns per scale; divides columns; columns itself for per-channel scales and float kinds
  int32_t kind, zero_code;
  int32_t scale_dtype;   // DType of vector.h
};

// What activations are rounded to in a product: nothing; int8 (quantized weights); bfloat16 (bfloat16 weights).
enum Form : int32_t { kFormFloat32 = 0, kFormInt8 = 1, kFormBFloat16 = 2 };

struct Rows {      // M rows of activations
  const float* x;  // [m][stride]
  int64_t m, stride, columns;
  int64_t group;   // the weight's; linears that share these rows share it (irrelevant where only `x` is read)
  int64_t block;   // columns per activation scale, a multiple of 8; a group's last block may be shorter
  int32_t form;    // which of the following exist, and what linear_share reads
  int8_t* q;       // [m][rows_q_stride]: int8 columns, groups padded as the weight's
  float* scale;    // [rows_blocks][m]: x ~ q * scale
  int32_t* sum;    // [rows_blocks][m]: sum of q, for zero points
  uint16_t* pairs; // [m][rows_pairs_stride]: bfloat16 columns, an odd last one followed by a zero
};

constexpr int64_t kShareScratchBytes = 1 << 17;  // scratch memory of linear_share, 64-byte aligned

inline int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }
inline int64_t linear_blocks(const Linear& l) { return (l.rows + 15) / 16; }  // the unit that callers distribute

// Activation blocks of one row, and bytes between rows of q: an odd number of cache lines, so that neighbouring rows are
// in different cache sets.
inline int64_t rows_blocks(const Rows& r) {
  const int64_t group = round_up(r.group, 8);
  return r.columns / r.group * ((group + r.block - 1) / r.block);
}
inline int64_t rows_q_stride(const Rows& r) { return round_up(r.columns / r.group * round_up(r.group, 8), 64) | 64; }
inline int64_t rows_pairs_stride(const Rows& r) { return round_up(r.columns, 32) | 32; }  // of two bytes each

// Return what a call rounds activations to in the product with `l`. `rounding` is what it may round them to, a sum of 1 <<
// Form; bfloat16 is used only if the machine multiplies it.
int32_t form_of(const Linear& l, int32_t rounding);

// The size of the rounded copy in bytes, and placing it in such memory (64-byte aligned).
int64_t rows_bytes(const Rows&);
void place_rows(Rows&, void* memory);

// The first column of an activation block; that of one past the last is `columns`.
inline int64_t block_column(const Rows& r, int64_t block) {
  const int64_t per_group = (round_up(r.group, 8) + r.block - 1) / r.block;
  return block / per_group * r.group + block % per_group * r.block;
}

// Round activation blocks [begin, end) of rows [first, last). To int8: each block of x with scale max|x| / 127. A block that
// holds an infinity or a NaN gets the scale NaN; one below 2^-100 throughout is zero.
void prepare_blocks(const Rows&, int64_t first, int64_t last, int64_t begin, int64_t end);
inline void prepare_rows(const Rows& r, int64_t first, int64_t last) { prepare_blocks(r, first, last, 0, rows_blocks(r)); }

// y[m][y_stride] (float32): output rows of blocks [begin, end), from the rows in their form (which prepare_rows has filled).
// Output columns past the last row are not written.
void linear_share(const Linear&, const Rows&, float* y, int64_t y_stride, int64_t begin, int64_t end, void* scratch);

}  // namespace qk
