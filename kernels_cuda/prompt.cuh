// How prompt.cu has tokens: images of 128 tokens by 64 columns, a row of 128 bytes per token.
//
// Columns stand in the order in which fragments of codes take them (unpack.cuh): of a half step's 32 columns, product s has
// 8 t + 4 s + {0, 1} in places 2 t + {0, 1}, and 8 t + 4 s + {2, 3} in places 8 + 2 t + {0, 1}. Piece c of row r (16 bytes) lies
// in the place of piece c ^ (r % 8), which keeps the rows of a product on different banks.
#pragma once
#include "unpack.cuh"

namespace qk {

constexpr int kPromptTokens = 128, kImage = kPromptTokens * 2 * kStep;  // bytes of an image

}  // namespace qk
