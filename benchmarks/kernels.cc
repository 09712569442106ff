// Products of one vector with weights in fewer bytes, for `benchmarks/kernels.py`: y[o] = scale[o] * sum_i w[o, i] x[i].
//
// Weights are widened in registers, right before they are multiplied, so that memory is read once and in few bytes.

#include <immintrin.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
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

__m256 Eight(const int8_t* w) {
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(w))));
}

__m256 Eight(const uint16_t* w) {  // bfloat16
  __m256i bits = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(w)));
  return _mm256_castsi256_ps(_mm256_slli_epi32(bits, 16));
}

float Sum(__m256 x) {
  __m128 half = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  half = _mm_add_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
}

// All weights, 32 inputs at a time.
template <typename T>
float DenseRow(const T* w, const float* x, int64_t inputs) {
  __m256 sums[4] = {};
  for (int64_t i = 0; i < inputs; i += 32)
    for (int j = 0; j < 4; ++j)
      sums[j] = _mm256_fmadd_ps(Eight(w + i + 8 * j), _mm256_loadu_ps(x + i + 8 * j), sums[j]);
  return Sum(_mm256_add_ps(_mm256_add_ps(sums[0], sums[1]), _mm256_add_ps(sums[2], sums[3])));
}

// Where each of 8 inputs finds its weight among the 4 kept, for each byte of places: two groups of four inputs, two
// weights each, two bits a weight.
struct Places {
  alignas(32) int32_t from[256][8];
  alignas(32) int32_t kept[256][8];

  Places() : from{}, kept{} {
    for (int byte = 0; byte < 256; ++byte)
      for (int n = 0; n < 4; ++n) {
        int input = 4 * (n / 2) + (byte >> (2 * n) & 3);
        from[byte][input] = n;
        kept[byte][input] = -1;
      }
  }
};
const Places kPlaces;

// Two weights of every four inputs: eight weights at a time are widened and go to sixteen inputs.
template <typename T>
float PairRow(const T* w, const uint8_t* places, const float* x, int64_t inputs) {
  __m256 sums[2] = {};
  for (int64_t i = 0; i < inputs; i += 16) {
    __m256 eight = Eight(w + i / 2);
    __m256 parts[2] = {eight, _mm256_permute2f128_ps(eight, eight, 0x11)};
    for (int j = 0; j < 2; ++j) {
      uint8_t byte = places[i / 8 + j];
      __m256i from = _mm256_load_si256(reinterpret_cast<const __m256i*>(kPlaces.from[byte]));
      __m256 kept = _mm256_load_ps(reinterpret_cast<const float*>(kPlaces.kept[byte]));
      __m256 spread = _mm256_and_ps(_mm256_permutevar8x32_ps(parts[j], from), kept);
      sums[j] = _mm256_fmadd_ps(spread, _mm256_loadu_ps(x + i + 8 * j), sums[j]);
    }
  }
  return Sum(_mm256_add_ps(sums[0], sums[1]));
}

template <typename T, ffi::DataType D>
ffi::Error Dense(ffi::ThreadPool pool, ffi::BufferR1<ffi::F32> x, ffi::BufferR2<D> w, ffi::BufferR1<ffi::F32> scale,
                 ffi::ResultBufferR1<ffi::F32> y) {
  int64_t rows = w.dimensions()[0], inputs = w.dimensions()[1];
  if (inputs % 32) return ffi::Error::InvalidArgument("inputs come in 32s");
  const T* weights = reinterpret_cast<const T*>(w.untyped_data());
  const float *in = x.typed_data(), *by = scale.typed_data();
  float* out = y->typed_data();
  ForRows(pool, rows, w.size_bytes(), [=](int64_t from, int64_t to) {
    for (int64_t o = from; o < to; ++o) out[o] = by[o] * DenseRow(weights + o * inputs, in, inputs);
  });
  return ffi::Error::Success();
}

template <typename T, ffi::DataType D>
ffi::Error Pairs(ffi::ThreadPool pool, ffi::BufferR1<ffi::F32> x, ffi::BufferR2<D> w, ffi::BufferR2<ffi::U8> places,
                 ffi::BufferR1<ffi::F32> scale, ffi::ResultBufferR1<ffi::F32> y) {
  int64_t rows = w.dimensions()[0], inputs = 2 * w.dimensions()[1];
  if (inputs % 16) return ffi::Error::InvalidArgument("inputs come in 16s");
  const T* weights = reinterpret_cast<const T*>(w.untyped_data());
  const uint8_t* where = places.typed_data();
  const float *in = x.typed_data(), *by = scale.typed_data();
  float* out = y->typed_data();
  ForRows(pool, rows, w.size_bytes() + places.size_bytes(), [=](int64_t from, int64_t to) {
    for (int64_t o = from; o < to; ++o)
      out[o] = by[o] * PairRow(weights + o * inputs / 2, where + o * inputs / 8, in, inputs);
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
#define PAIRS(NAME, T, D)                                                                 \
  XLA_FFI_DEFINE_HANDLER_SYMBOL(NAME, (Pairs<T, D>),                                      \
                                ffi::Ffi::Bind()                                          \
                                    .Ctx<ffi::ThreadPool>()                               \
                                    .Arg<ffi::BufferR1<ffi::F32>>()                       \
                                    .Arg<ffi::BufferR2<D>>()                              \
                                    .Arg<ffi::BufferR2<ffi::U8>>()                        \
                                    .Arg<ffi::BufferR1<ffi::F32>>()                       \
                                    .Ret<ffi::BufferR1<ffi::F32>>())

DENSE(dense_bfloat16, uint16_t, ffi::BF16);
DENSE(dense_int8, int8_t, ffi::S8);
PAIRS(pairs_bfloat16, uint16_t, ffi::BF16);
PAIRS(pairs_int8, int8_t, ffi::S8);
