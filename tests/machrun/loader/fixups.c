// Relocation: chained fixups and dyld's opcodes (<mach-o/fixup-chains.h>,
// <mach-o/loader.h>).
#include <stdlib.h>
#include <string.h>

#include "machrun.h"

uint64_t read_uleb(const Image* image, const uint8_t** at, const uint8_t* end) {
  uint64_t value = 0;
  for (int shift = 0; *at < end && shift < 64; shift += 7) {
    uint8_t byte = *(*at)++;
    value |= (uint64_t)(byte & 0x7f) << shift;
    if (!(byte & 0x80)) return value;
  }
  refuse(image, "damaged: a number without an end");
}

static int64_t read_sleb(const Image* image, const uint8_t** at,
                         const uint8_t* end) {
  const uint8_t* start = *at;
  uint64_t value = read_uleb(image, at, end);
  int bits = 7 * (int)(*at - start);
  bool negative = bits < 64 && (*at)[-1] & 0x40;
  return (int64_t)(negative ? value | -(1ull << bits) : value);
}

// ---- chained ---------------------------------------------------------------

enum {
  kImport = 1,
  kImportAddend = 2,
  kImportAddend64 = 3,
  kPointer64 = 2,
  kPointer64Offset = 6,
  kNoStart = 0xffff,
};

typedef struct {
  const uint8_t* imports;
  const char* names;
  uint64_t names_size;
  uint32_t count, format;
} Imports;

static const char* name_at(const Image* image, const Imports* imports,
                           uint64_t offset) {
  if (offset >= imports->names_size ||
      !memchr(imports->names + offset, 0, imports->names_size - offset))
    refuse(image, "truncated: the name of an import is behind its end");
  return imports->names + offset;
}

// The address of an import, with the addend that is in the list.
static uint64_t import_target(const Image* image, const Imports* imports,
                              uint32_t index) {
  if (index >= imports->count)
    refuse(image, "damaged: import %u of %u", index, imports->count);
  if (imports->format == kImportAddend64) {
    const uint64_t* entry = (const uint64_t*)imports->imports + 2 * index;
    const char* name = name_at(image, imports, entry[0] >> 32);
    int ordinal = (int16_t)(entry[0] & 0xffff);
    return (uint64_t)bind_symbol(image, ordinal, name, entry[0] >> 16 & 1) +
           entry[1];
  }
  size_t step = imports->format == kImport ? 1 : 2;
  const uint32_t* entry = (const uint32_t*)imports->imports + step * index;
  int ordinal = (int8_t)(entry[0] & 0xff);
  const char* name = name_at(image, imports, entry[0] >> 9);
  void* found = bind_symbol(image, ordinal, name, entry[0] >> 8 & 1);
  return (uint64_t)found + (step == 2 ? (uint64_t)(int32_t)entry[1] : 0);
}

static void follow_chain(const Image* image, uint8_t* at, const uint8_t* end,
                         uint16_t format, const uint64_t* targets,
                         uint32_t count) {
  uint64_t slide = (uint64_t)image->base - image->preferred;
  for (;;) {
    if (at + 8 > end)
      refuse(image, "damaged: a chain of fixups leaves its segment");
    uint64_t raw;
    memcpy(&raw, at, 8);
    uint64_t next = raw >> 51 & 0xfff, value;
    if (raw >> 63) {
      uint32_t index = raw & 0xffffff;
      if (index >= count)
        refuse(image, "damaged: import %u of %u", index, count);
      value = targets[index] + (raw >> 24 & 0xff);
    } else {
      value = (raw & 0xfffffffffull) +
              (format == kPointer64Offset ? (uint64_t)image->base : slide);
      value |= (raw >> 36 & 0xff) << 56;
    }
    memcpy(at, &value, 8);
    if (next == 0) return;
    at += 4 * next;
  }
}

static void fix_segment(const Image* image, const Segment* segment,
                        const ChainedStarts* starts, const uint64_t* targets,
                        uint32_t count) {
  uint16_t format = starts->pointer_format;
  if (format != kPointer64 && format != kPointer64Offset)
    refuse(image, "unknown fixup format: pointers of format %u", format);
  if (starts->size < sizeof *starts + 2 * starts->page_count)
    refuse(image, "truncated: its fixups end too early");
  for (int page = 0; page < starts->page_count; page++) {
    uint16_t start = starts->page_start[page];
    if (start == kNoStart) continue;
    if (start & 0x8000)
      refuse(image, "unknown fixup format: several chains in a page");
    uint8_t* at = segment->start + (uint64_t)page * starts->page_size + start;
    follow_chain(image, at, segment->start + segment->size, format, targets,
                 count);
  }
}

static void apply_chained(Image* image) {
  const uint8_t* all = image->file + image->fixups.offset;
  uint64_t size = image->fixups.size;
  const ChainedFixups* header = (const void*)all;
  if (size < sizeof *header)
    refuse(image, "truncated: its fixups end too early");
  if (header->version != 0 || header->symbols_format != 0 ||
      header->imports_format < kImport ||
      header->imports_format > kImportAddend64)
    refuse(image, "unknown fixup format: version %u, imports of format %u",
           header->version, header->imports_format);
  static const uint8_t kEntry[] = {0, 4, 8, 16};
  uint64_t needed =
      (uint64_t)header->imports_count * kEntry[header->imports_format];
  if (header->imports_offset > size || needed > size - header->imports_offset ||
      header->symbols_offset > size || header->starts_offset > size - 4)
    refuse(image, "truncated: its fixups end too early");
  Imports imports = {all + header->imports_offset,
                     (const char*)all + header->symbols_offset,
                     size - header->symbols_offset, header->imports_count,
                     header->imports_format};
  uint64_t* targets = calloc(imports.count + 1, sizeof *targets);
  if (targets == NULL) refuse(image, "no room for %u imports", imports.count);
  for (uint32_t i = 0; i < imports.count; i++)
    targets[i] = import_target(image, &imports, i);
  const uint32_t* starts = (const void*)(all + header->starts_offset);
  if (starts[0] != (uint32_t)image->segment_count ||
      4ull * (starts[0] + 1) > size - header->starts_offset)
    refuse(image, "damaged: fixups of %u segments", starts[0]);
  for (uint32_t i = 0; i < starts[0]; i++) {
    if (starts[i + 1] == 0) continue;
    uint64_t at = header->starts_offset + (uint64_t)starts[i + 1];
    if (at + sizeof(ChainedStarts) > size)
      refuse(image, "truncated: its fixups end too early");
    fix_segment(image, &image->segments[i], (const void*)(all + at), targets,
                imports.count);
  }
  free(targets);
}

// ---- opcodes ---------------------------------------------------------------

typedef struct {
  Image* image;
  const uint8_t *at, *end;
  int segment, ordinal;
  uint64_t offset;
  int64_t addend;
  const char* name;
  bool weak_import;
  enum { kBind, kBindWeak, kBindLazy } kind;
} Opcodes;

static Opcodes opcodes_of(Image* image, Range range, int kind) {
  const uint8_t* start =
      file_range(image, range.offset, range.size, "binding opcodes");
  return (Opcodes){
      .image = image, .at = start, .end = start + range.size, .kind = kind};
}

static uint64_t* place(const Opcodes* o) {
  const Image* image = o->image;
  if (o->segment >= image->segment_count ||
      o->offset + 8 > image->segments[o->segment].size)
    refuse(image, "damaged: a fixup outside of its segment");
  return (uint64_t*)(image->segments[o->segment].start + o->offset);
}

static void rebase(Opcodes* o, uint64_t count, uint64_t skip) {
  for (; count > 0; count--, o->offset += 8 + skip)
    *place(o) += (uint64_t)o->image->base - o->image->preferred;
}

static void bind(Opcodes* o, uint64_t count, uint64_t skip) {
  for (; count > 0; count--, o->offset += 8 + skip) {
    void* found = o->kind == kBindWeak ? coalesced(o->name)
                                       : bind_symbol(o->image, o->ordinal,
                                                     o->name, o->weak_import);
    // Nobody exports it: the image's own private one stays.
    if (o->kind == kBindWeak && found == NULL) continue;
    *place(o) = (uint64_t)found + (uint64_t)o->addend;
  }
}

static void set_name(Opcodes* o) {
  const uint8_t* end = memchr(o->at, 0, (size_t)(o->end - o->at));
  if (end == NULL) refuse(o->image, "truncated: a name without an end");
  o->name = (const char*)o->at;
  o->at = end + 1;
}

static void run_bind(Opcodes o) {
  while (o.at < o.end) {
    uint8_t opcode = *o.at & 0xf0, immediate = *o.at & 0x0f;
    o.at++;
#define ULEB() read_uleb(o.image, &o.at, o.end)
    switch (opcode) {
      case 0x00:
        if (o.kind == kBindLazy) break;  // one after each
        return;
      case 0x10:
        o.ordinal = immediate;
        break;
      case 0x20:
        o.ordinal = (int)ULEB();
        break;
      case 0x30:
        o.ordinal = immediate ? (int8_t)(0xf0 | immediate) : 0;
        break;
      case 0x40:
        o.weak_import = immediate & 1;
        set_name(&o);
        break;
      case 0x50:
        if (immediate != 1)
          refuse(o.image, "unknown fixup format: type %u", immediate);
        break;
      case 0x60:
        o.addend = read_sleb(o.image, &o.at, o.end);
        break;
      case 0x70:
        o.segment = immediate;
        o.offset = ULEB();
        break;
      case 0x80:
        o.offset += ULEB();
        break;
      case 0x90:
        bind(&o, 1, 0);
        break;
      case 0xa0:
        bind(&o, 1, 0);
        o.offset += ULEB();
        break;
      case 0xb0:
        bind(&o, 1, 8ull * immediate);
        break;
      case 0xc0: {
        uint64_t count = ULEB(), skip = ULEB();
        bind(&o, count, skip);
        break;
      }
      default:
        refuse(o.image, "unknown fixup format: bind opcode %#x", opcode);
    }
  }
}

static void run_rebase(Opcodes o) {
  while (o.at < o.end) {
    uint8_t opcode = *o.at & 0xf0, immediate = *o.at & 0x0f;
    o.at++;
    switch (opcode) {
      case 0x00:
        return;
      case 0x10:
        break;
      case 0x20:
        o.segment = immediate;
        o.offset = ULEB();
        break;
      case 0x30:
        o.offset += ULEB();
        break;
      case 0x40:
        o.offset += 8ull * immediate;
        break;
      case 0x50:
        rebase(&o, immediate, 0);
        break;
      case 0x60:
        rebase(&o, ULEB(), 0);
        break;
      case 0x70:
        rebase(&o, 1, 0);
        o.offset += ULEB();
        break;
      case 0x80: {
        uint64_t count = ULEB(), skip = ULEB();
        rebase(&o, count, skip);
        break;
      }
      default:
        refuse(o.image, "unknown fixup format: rebase opcode %#x", opcode);
    }
#undef ULEB
  }
}

void apply_fixups(Image* image) {
  const DyldInfoCommand* info = image->dyld_info;
  if (image->fixups.size > 0) {
    apply_chained(image);
  } else if (info != NULL) {
    run_rebase(opcodes_of(image, info->rebase, kBind));
    run_bind(opcodes_of(image, info->bind, kBind));
    run_bind(opcodes_of(image, info->lazy_bind, kBindLazy));
    run_bind(opcodes_of(image, info->weak_bind, kBindWeak));
  } else {
    refuse(image, "unknown fixup format: neither chained nor opcodes");
  }
}
