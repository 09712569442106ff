// Products of one vector with weights in fewer bytes, for `benchmarks/kernels.py`: y[o] = scale[o] * sum_i w[o, i] x[i].
//
// Weights are widened in registers, right before they are multiplied, so that memory is read once and in few bytes.

#include <immintrin.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <thread>

#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace {

// Parts of the work are taken by whoever is free, the caller first of all: nobody waits for a thread that never comes.
struct Work {
  std::function<void(int64_t, int64_t)> run;
  int64_t rows, step;
  std::atomic<int64_t> next{0}, done{0};

  void Help() {
    for (int64_t from; (from = next.fetch_add(step)) < rows;) {
      int64_t to = std::min(from + step, rows);
      run(from, to);
      done.fetch_add(to - from, std::memory_order_release);
    }
  }
};

void ForRows(ffi::ThreadPool& pool, int64_t rows, int64_t bytes, std::function<void(int64_t, int64_t)> run) {
  int64_t threads = pool.num_threads();
  if (threads < 2 || bytes < (1 << 18)) return run(0, rows);  // to wake a thread takes longer
  auto work = std::make_shared<Work>();
  work->run = std::move(run), work->rows = rows, work->step = std::max<int64_t>(rows / (4 * threads), 1);
  for (int64_t t = 1; t < threads; ++t) pool.Schedule([work] { work->Help(); });
  work->Help();
  while (work->done.load(std::memory_order_acquire) < rows) std::this_thread::yield();
}

// 16 weights as float32.
__m512 Wide(__m128i int8) { return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(int8)); }
__m512 Wide(__m256i bfloat16) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bfloat16), 16));
}

// Sums of products of 64 weights of one byte, or 32 of two, that fill a register.
void Multiply(__m512i w, const float* x, __m512 (&sums)[4], int8_t) {
  sums[0] = _mm512_fmadd_ps(Wide(_mm512_castsi512_si128(w)), _mm512_loadu_ps(x), sums[0]);
  sums[1] = _mm512_fmadd_ps(Wide(_mm512_extracti32x4_epi32(w, 1)), _mm512_loadu_ps(x + 16), sums[1]);
  sums[2] = _mm512_fmadd_ps(Wide(_mm512_extracti32x4_epi32(w, 2)), _mm512_loadu_ps(x + 32), sums[2]);
  sums[3] = _mm512_fmadd_ps(Wide(_mm512_extracti32x4_epi32(w, 3)), _mm512_loadu_ps(x + 48), sums[3]);
}
void Multiply(__m512i w, const float* x, __m512 (&sums)[4], uint16_t) {
  sums[0] = _mm512_fmadd_ps(Wide(_mm512_castsi512_si256(w)), _mm512_loadu_ps(x), sums[0]);
  sums[1] = _mm512_fmadd_ps(Wide(_mm512_extracti64x4_epi64(w, 1)), _mm512_loadu_ps(x + 16), sums[1]);
}

__m512i Load(const void* w) { return _mm512_loadu_si512(w); }

float Total(const __m512 (&sums)[4]) {
  return _mm512_reduce_add_ps(_mm512_add_ps(_mm512_add_ps(sums[0], sums[1]), _mm512_add_ps(sums[2], sums[3])));
}

// All weights of a row.
template <typename T>
float DenseRow(const T* w, const float* x, int64_t inputs) {
  constexpr int64_t kEach = 64 / sizeof(T);
  __m512 sums[4] = {};
  for (int64_t i = 0; i < inputs; i += kEach) Multiply(Load(w + i), x + i, sums, T());
  return Total(sums);
}

// The first weights of a register go to where the bits are, the others are zero.
__m512i Spread(uint64_t bits, __m512i w, int8_t) { return _mm512_maskz_expand_epi8(bits, w); }
__m512i Spread(uint64_t bits, __m512i w, uint16_t) { return _mm512_maskz_expand_epi16(bits, w); }

// The kept weights of a row go to where the bits of the mask are.
template <typename T>
float MaskedRow(const T* w, const uint8_t* bits, const float* x, int64_t inputs) {
  constexpr int64_t kEach = 64 / sizeof(T);
  __m512 sums[4] = {};
  for (int64_t i = 0; i < inputs; i += kEach) {
    uint64_t kept = 0;
    std::memcpy(&kept, bits + i / 8, kEach / 8);
    Multiply(Spread(kept, Load(w), T()), x + i, sums, T());
    w += _mm_popcnt_u64(kept);
  }
  return Total(sums);
}

template <typename T, ffi::DataType D>
ffi::Error Dense(ffi::ThreadPool pool, ffi::BufferR1<ffi::F32> x, ffi::BufferR2<D> w, ffi::BufferR1<ffi::F32> scale,
                 ffi::ResultBufferR1<ffi::F32> y) {
  int64_t rows = w.dimensions()[0], inputs = w.dimensions()[1];
  if (inputs % 64) return ffi::Error::InvalidArgument("inputs come in 64s");
  const T* weights = reinterpret_cast<const T*>(w.untyped_data());
  const float *in = x.typed_data(), *by = scale.typed_data();
  float* out = y->typed_data();
  ForRows(pool, rows, w.size_bytes(), [=](int64_t from, int64_t to) {
    for (int64_t o = from; o < to; ++o) out[o] = by[o] * DenseRow(weights + o * inputs, in, inputs);
  });
  return ffi::Error::Success();
}

template <typename T, ffi::DataType D>
ffi::Error Masked(ffi::ThreadPool pool, ffi::BufferR1<ffi::F32> x, ffi::BufferR1<D> w, ffi::BufferR2<ffi::U8> mask,
                  ffi::BufferR1<ffi::S32> starts, ffi::BufferR1<ffi::F32> scale, ffi::ResultBufferR1<ffi::F32> y) {
  int64_t rows = mask.dimensions()[0], inputs = 8 * mask.dimensions()[1];
  if (inputs % 64) return ffi::Error::InvalidArgument("inputs come in 64s");
  const T* weights = reinterpret_cast<const T*>(w.untyped_data());
  const uint8_t* bits = mask.typed_data();
  const int32_t* first = starts.typed_data();
  const float *in = x.typed_data(), *by = scale.typed_data();
  float* out = y->typed_data();
  ForRows(pool, rows, w.size_bytes() + mask.size_bytes(), [=](int64_t from, int64_t to) {
    for (int64_t o = from; o < to; ++o)
      out[o] = by[o] * MaskedRow(weights + first[o], bits + o * inputs / 8, in, inputs);
  });
  return ffi::Error::Success();
}

}  // namespace

#define DENSE(NAME, T, D)                                                                 \
  XLA_FFI_DEFINE_HANDLER_SYMBOL(NAME, (Dense<T, D>),                                      \
                                ffi::Ffi::Bind()                                          \
                                    .Ctx<ffi::ThreadPool>()                               \
                                    .Arg<ffi::BufferR1<ffi::F32>>()                       \
                                    .Arg<ffi::BufferR2<D>>()                              \
                                    .Arg<ffi::BufferR1<ffi::F32>>()                       \
                                    .Ret<ffi::BufferR1<ffi::F32>>())
#define MASKED(NAME, T, D)                                                                \
  XLA_FFI_DEFINE_HANDLER_SYMBOL(NAME, (Masked<T, D>),                                     \
                                ffi::Ffi::Bind()                                          \
                                    .Ctx<ffi::ThreadPool>()                               \
                                    .Arg<ffi::BufferR1<ffi::F32>>()                       \
                                    .Arg<ffi::BufferR1<D>>()                              \
                                    .Arg<ffi::BufferR2<ffi::U8>>()                        \
                                    .Arg<ffi::BufferR1<ffi::S32>>()                       \
                                    .Arg<ffi::BufferR1<ffi::F32>>()                       \
                                    .Ret<ffi::BufferR1<ffi::F32>>())

DENSE(dense_bfloat16, uint16_t, ffi::BF16);
DENSE(dense_int8, int8_t, ffi::S8);
MASKED(masked_bfloat16, uint16_t, ffi::BF16);
MASKED(masked_int8, int8_t, ffi::S8);
