// y = x W^T (+ b): a prepacked weight, rows of activations that are rounded once, and a thread's share of the product.
//
// Callers distribute [0, linear_blocks) over their threads. Nothing here allocates memory, starts threads or depends on torch.
//
// Layout of a weight. Rows come in blocks of 16, one row per 32-bit lane; columns in groups (those that share a scale), each
// padded to a multiple of 8. codes[block][group][word][16 lanes], a word holding consecutive columns of its lane's row:
//   U4        8 columns: byte j has column j in its low half and column 4 + j in its high half
//   U8        4 columns, byte j column j
//   T4        as U4; a code stands for one of the 16 numbers of a table
//   F8        as U8; a code is a float of 8 bits, e4m3
//   BFloat16  2 columns, the first in the low half
//   Float32   1 column
//   Planes    codes of 8 bits as two planes of 4, c = 16 h + l: all of h in the layout of U4, then all of l
//   HighPlane the same memory, of which only h is read, with 16 h + 8 for every code: an approximation of the weight at half
//   the bytes
// A weight is number * scale + offset, where the number of U4, U8 and planes is code - zero.
// Float kinds have one group. Padding (rows past the last, columns past a group) does not affect the result.
//
// A row of y depends on its row of x only: it is bitwise independent of m, the number of threads and the other rows.
#pragma once
#include <cstdint>

namespace qk {

enum WeightKind : int32_t {
  kWeightFloat32 = 0, kWeightBFloat16 = 1, kWeightU4 = 2, kWeightU8 = 3, kWeightPlanes = 4, kWeightHighPlane = 5,
  kWeightT4 = 6, kWeightF8 = 7
};

// How scales and offsets are stored: the float types of vector.h; powers of two; floats of 8 bits; integers of 8 bits that are
// multiplied by a half float of several groups.
enum ScaleType : int32_t { kScaleE8M0 = 3, kScaleE4M3 = 4, kScaleInt8 = 5 };

struct Table {        // of T4, by code
  float number[16];
  uint16_t pair[32];  // the numbers as bfloat16, twice
  uint8_t byte[16];   // 128 + the number in `unit`s, for int8 products
  float unit;
  int32_t exact;      // whether numbers are whole multiples of the unit
};

// What a scheme rounds the inputs of a linear to: integers of `top` = 127 for 8 bits and so on, or floats of 8 bits (top 0).
struct Inputs {
  const float* mixing;  // [mixes][mixes]: rotated before they are rounded, by (this matrix x Sylvester's); null: not rotated
  int64_t mixes;
  int64_t group;        // columns per scale
  float scale;          // a stored one; 0: found for every row and group
  int32_t top;
};

struct Linear {          // filled in Python through ctypes (kernels/cpu/layout.py); plain pointers, all owned elsewhere
  const void* codes;     // 64-byte aligned
  const void* scales;    // [block][group][16] of `scale_dtype`; null for float kinds
  const uint8_t* zeros;  // [block][group][16], or null if all are `zero_code`
  const void* offsets;   // as scales, or null if all are 0; with them there are neither zeros nor a table
  const uint16_t* supers;  // of kScaleInt8: half floats [block][groups / super][16], those of scales, then those of offsets
  const Table* table;    // of T4
  const Inputs* inputs;  // null: inputs are not rounded by a scheme
  const float* bias;     // [rows], or null
  int64_t rows, columns; // N, K of the model
  int64_t group;         // columns per scale; divides columns; columns itself for per-channel scales and float kinds
  int64_t super;         // groups per half float of `supers`, as a power of two
  int32_t kind, zero_code;
  int32_t scale_dtype;   // DType of vector.h, or ScaleType
  float factor;          // of all scales
};

// What a product reads of activations:
//   Float32   x itself, not rounded
//   Int8      q, rounded blocks (quantized weights)
//   BFloat16  pairs, rounded (bfloat16 weights)
//   Pairs     the same for codes: columns 0 2 1 3 of every four, groups padded as the weight's, and the sums of blocks
//   Floats    a float32 copy, rounded as `inputs` say, and the sums of blocks
enum Form : int32_t { kFormFloat32 = 0, kFormInt8 = 1, kFormBFloat16 = 2, kFormPairs = 3, kFormFloats = 4 };

struct Rows {      // M rows of activations
  const float* x;  // [m][stride]
  int64_t m, stride, columns;
  int64_t group;   // the weight's; linears that share these rows share it (irrelevant where only `x` is read)
  int64_t block;   // columns per block (of one activation scale, or sum), a multiple of 8; a group's last one may be shorter
  int32_t form;    // which of the following exist, and what linear_share reads
  const Inputs* inputs;  // how a scheme rounds, or null
  int8_t* q;       // [m][rows_q_stride]: int8 columns, groups padded as the weight's
  float* scale;    // [rows_blocks][m]: x ~ q * scale; of Pairs, [m], or null
  int32_t* sum;    // [rows_blocks][m]: sum of q, for zero points
  uint16_t* pairs; // [m][rows_pairs_stride]: bfloat16 columns, an odd last one followed by a zero
  float* total;    // [rows_blocks][m]: sum of what Pairs and Floats hold
  float* own;      // [m][columns]: rotated, or rounded to floats
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
inline int64_t rows_padded(const Rows& r) { return r.columns / r.group * round_up(r.group, 8); }  // columns, with padding
inline int64_t rows_q_stride(const Rows& r) { return round_up(rows_padded(r), 64) | 64; }
inline int64_t rows_pairs_stride(const Rows& r) {  // of two bytes each
  return round_up(r.form == kFormPairs ? rows_padded(r) : r.columns, 32) | 32;
}

// Return in which form a call reads activations in the product with `l`. `rounding` is what it may round them to where no
// scheme says so, a sum of 1 << Form; bfloat16 is used only if the machine multiplies it fast.
int32_t form_of(const Linear& l, int32_t rounding);

// Whether bfloat16 numbers are multiplied, and faster than floats.
bool fast_pairs();

// Set form, group, block and inputs of rows for `l`; `block`: columns per scale of int8 activations that no scheme rounds.
void fit_rows(Rows&, const Linear& l, int32_t rounding, int64_t block);

// Whether rows fitted for one linear serve another.
inline bool same_inputs(const Inputs* a, const Inputs* b) {
  if (!a || !b) return a == b;
  return a->mixing == b->mixing && a->group == b->group && a->scale == b->scale && a->top == b->top;
}

// Whether a block can be rounded only if the whole row is known.
inline bool whole_rows(const Rows& r) {
  return r.inputs && (r.inputs->mixing || (r.inputs->scale == 0 && r.inputs->group > r.block));
}

// The size of the rounded copy in bytes, and placing it in such memory (64-byte aligned).
int64_t rows_bytes(const Rows&);
void place_rows(Rows&, void* memory);

// The first column of an activation block; that of one past the last is `columns`.
inline int64_t block_column(const Rows& r, int64_t block) {
  const int64_t per_group = (round_up(r.group, 8) + r.block - 1) / r.block;
  return block / per_group * r.group + block % per_group * r.block;
}

// Round activation blocks [begin, end) of rows [first, last); all of a row where `whole_rows`. To int8, unless a scheme has its
// own rule: each block of x with scale max|x| / 127. A block that holds an infinity or a NaN gets the scale NaN; one below
// 2^-100 throughout is zero.
void prepare_blocks(const Rows&, int64_t first, int64_t last, int64_t begin, int64_t end);
inline void prepare_rows(const Rows& r, int64_t first, int64_t last) { prepare_blocks(r, first, last, 0, rows_blocks(r)); }

// y[m][y_stride] (float32): output rows of blocks [begin, end), from the rows in their form (which prepare_rows has filled).
// Output columns past the last row are not written.
void linear_share(const Linear&, const Rows&, float* y, int64_t y_stride, int64_t begin, int64_t end, void* scratch);

}  // namespace qk
