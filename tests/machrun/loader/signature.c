// The ad-hoc signature (Apple's <kern/cs_blobs.h>): SHA-256 of every page.
#include <string.h>

#include "machrun.h"

enum { kSuperBlob = 0xfade0cc0, kCodeDirectory = 0xfade0c02, kHash = 32 };

static uint32_t big(const uint8_t* at) {
  return (uint32_t)at[0] << 24 | at[1] << 16 | at[2] << 8 | at[3];
}

static uint32_t rotated(uint32_t x, int by) { return x >> by | x << (32 - by); }

static const uint32_t kRound[64] = {
    0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, 0x3956c25b, 0x59f111f1,
    0x923f82a4, 0xab1c5ed5, 0xd807aa98, 0x12835b01, 0x243185be, 0x550c7dc3,
    0x72be5d74, 0x80deb1fe, 0x9bdc06a7, 0xc19bf174, 0xe49b69c1, 0xefbe4786,
    0x0fc19dc6, 0x240ca1cc, 0x2de92c6f, 0x4a7484aa, 0x5cb0a9dc, 0x76f988da,
    0x983e5152, 0xa831c66d, 0xb00327c8, 0xbf597fc7, 0xc6e00bf3, 0xd5a79147,
    0x06ca6351, 0x14292967, 0x27b70a85, 0x2e1b2138, 0x4d2c6dfc, 0x53380d13,
    0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85, 0xa2bfe8a1, 0xa81a664b,
    0xc24b8b70, 0xc76c51a3, 0xd192e819, 0xd6990624, 0xf40e3585, 0x106aa070,
    0x19a4c116, 0x1e376c08, 0x2748774c, 0x34b0bcb5, 0x391c0cb3, 0x4ed8aa4a,
    0x5b9cca4f, 0x682e6ff3, 0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208,
    0x90befffa, 0xa4506ceb, 0xbef9a3f7, 0xc67178f2};

static void add_block(uint32_t state[8], const uint8_t* block) {
  uint32_t w[64], s[8];
  for (int i = 0; i < 16; i++) w[i] = big(block + 4 * i);
  for (int i = 16; i < 64; i++) {
    uint32_t a = w[i - 15], b = w[i - 2];
    w[i] = w[i - 16] + w[i - 7] + (rotated(a, 7) ^ rotated(a, 18) ^ a >> 3) +
           (rotated(b, 17) ^ rotated(b, 19) ^ b >> 10);
  }
  memcpy(s, state, sizeof s);
  for (int i = 0; i < 64; i++) {
    uint32_t e = s[4], a = s[0];
    uint32_t one = s[7] + (rotated(e, 6) ^ rotated(e, 11) ^ rotated(e, 25)) +
                   ((e & s[5]) ^ (~e & s[6])) + kRound[i] + w[i];
    uint32_t two = (rotated(a, 2) ^ rotated(a, 13) ^ rotated(a, 22)) +
                   ((a & s[1]) ^ (a & s[2]) ^ (s[1] & s[2]));
    memmove(s + 1, s, 7 * sizeof *s);
    s[4] += one;
    s[0] = one + two;
  }
  for (int i = 0; i < 8; i++) state[i] += s[i];
}

static void sha256(const uint8_t* data, uint64_t size, uint8_t hash[kHash]) {
  uint32_t state[8] = {0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a,
                       0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19};
  uint64_t left = size;
  for (; left >= 64; left -= 64, data += 64) add_block(state, data);
  uint8_t last[128] = {0};
  memcpy(last, data, left);
  last[left] = 0x80;
  uint64_t whole = left < 56 ? 64 : 128;
  for (int i = 0; i < 8; i++)
    last[whole - 1 - i] = (uint8_t)(size * 8 >> 8 * i);
  add_block(state, last);
  if (whole == 128) add_block(state, last + 64);
  for (uint32_t i = 0; i < kHash; i++)
    hash[i] = (uint8_t)(state[i / 4] >> (24 - 8 * (i % 4)));
}

// Where the code directory begins, from the start of the file.
static uint64_t find_directory(const Image* image) {
  Range all = image->signature;
  const uint8_t* blob = file_range(image, all.offset, 12, "signature");
  uint32_t count = big(blob + 8);
  if (big(blob) != kSuperBlob || big(blob + 4) > all.size || count > 16)
    refuse(image, "its signature is damaged");
  blob = file_range(image, all.offset, 12 + 8ull * count, "signature");
  for (uint32_t i = 0; i < count; i++)
    if (big(blob + 12 + 8 * i) == 0) return all.offset + big(blob + 16 + 8 * i);
  refuse(image, "its signature has no code directory");
}

void check_signature(const Image* image) {
  if (image->signature.size == 0)
    refuse(image, "it is not signed: macOS does not load it");
  uint64_t at = find_directory(image);
  const uint8_t* directory = file_range(image, at, 44, "signature");
  uint32_t hashes = big(directory + 16), slots = big(directory + 28);
  uint64_t covered = big(directory + 32), page = 1ull << (directory[39] & 31);
  if (big(directory) != kCodeDirectory || directory[36] != kHash ||
      directory[37] != 2)
    refuse(image, "its signature is not of SHA-256 hashes");
  if (covered != image->signature.offset ||
      slots != (covered + page - 1) / page)
    refuse(image, "its signature covers %lu bytes of %u", covered,
           image->signature.offset);
  const uint8_t* signed_hash =
      file_range(image, at + hashes, (uint64_t)kHash * slots, "signature");
  for (uint32_t i = 0; i < slots; i++, signed_hash += kHash) {
    uint8_t hash[kHash];
    uint64_t start = i * page,
             size = covered - start < page ? covered - start : page;
    sha256(image->file + start, size, hash);
    if (memcmp(hash, signed_hash, kHash))
      refuse(image, "page %u is not what was signed: macOS kills the process",
             i);
  }
}
