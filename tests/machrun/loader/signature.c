// The ad-hoc signature (Apple's <kern/cs_blobs.h>, which ziglang lacks): SHA-256 of
// every page.
#include <string.h>

#include "machrun.h"

enum { kSuperBlob = 0xfade0cc0, kCodeDirectory = 0xfade0c02, kHash = 32 };

void sha256(const uint8_t* data, size_t size, uint8_t hash[kHash]);

static uint32_t big(const uint8_t* at) {
  return (uint32_t)at[0] << 24 | at[1] << 16 | at[2] << 8 | at[3];
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
    refuse(image, "its signature covers %lu of %u bytes, in %u pages of %lu",
           covered, image->signature.offset, slots, page);
  for (int i = 0; i < image->segment_count; i++) {
    const SegmentCommand* segment = image->segments[i].command;
    bool linkedit = !strncmp(segment->segname, SEG_LINKEDIT, 16) &&
                    !(segment->initprot & 6);
    if (!linkedit && segment->fileoff + segment->filesize > covered)
      refuse(image, "segment %.16s is not all signed", segment->segname);
  }
  const uint8_t* signed_hash =
      file_range(image, at + hashes, (uint64_t)kHash * slots, "signature");
  for (uint64_t i = 0; i < slots; i++, signed_hash += kHash) {
    uint8_t hash[kHash];
    uint64_t start = i * page;
    sha256(image->file + start, covered - start < page ? covered - start : page,
           hash);
    if (memcmp(hash, signed_hash, kHash))
      refuse(image, "page %lu is not what was signed: macOS kills the process",
             i);
  }
}
