// Keys and values in pages of 32 tokens: how they are stored, and how a new token is rounded.
//
//   float: T          (pages, kv heads, 32 tokens, head size)
//   int8:  bytes      code - 128 times a float32 scale per token and head: scales (pages, kv heads, 32)
//   int4:  half bytes (code - zero) times a scale of T per 32 channels: a word (pages, kv heads, 32, head size / 32), scale in the
//          low half, zero in the high one. Channel 2i is the low half of byte i.
#pragma once
#include "device.cuh"

namespace qk {

constexpr int kPageTokens = 32, kKvGroup = 32;
enum KvKind { kKvFloat, kKvInt8, kKvInt4 };


}  // namespace qk
