#pragma once

// Register-only loops that reach a processor's arithmetic peak. Plain declarations: this header is
// shared with files compiled for one instruction set.
namespace longspan::avx512 {
// `iterations` x 24 fused multiply-adds of 16 floats; returns a value that depends on all of them.
float FmaLoop(long iterations);
}  // namespace longspan::avx512
namespace longspan::amx {
// `iterations` x 4 products of 16 x 32 by 32 x 16 bf16 tiles.
float DotLoop(long iterations);
}  // namespace longspan::amx
namespace longspan::avx512_bf16 {
// `iterations` x 24 dot products of 32 bf16 pairs into 16 floats.
float DotLoop(long iterations);
}  // namespace longspan::avx512_bf16
