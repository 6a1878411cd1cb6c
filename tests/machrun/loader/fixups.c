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

// What is relocated lies in the image; or right behind it, as an end may.
static void check_target(const Image* image, uint64_t offset) {
  if (offset > image->size)
    refuse(image, "damaged: a pointer to %#lx, outside of its segments", offset);
}
static void check_writable(const Image* image, const Segment* segment) {
  if (!(segment->command->initprot & 2))
    refuse(image, "damaged: a fixup in segment %.16s, which is not writable",
           segment->command->segname);
}

// ---- chained ---------------------------------------------------------------

typedef struct dyld_chained_starts_in_segment ChainedStarts;

// The `size` bytes of the fixups at an offset.
static const void* in_fixups(const Image* image, uint64_t offset,
                             uint64_t size) {
  if (offset > image->fixups.size || size > image->fixups.size - offset)
    refuse(image, "truncated: its fixups end too early");
  return image->file + image->fixups.offset + offset;
}

// The addresses of all imports.
static uint64_t* import_targets(const Image* image,
                                const struct dyld_chained_fixups_header* all) {
  const struct dyld_chained_import* import;
  if (all->fixups_version != 0 || all->symbols_format != 0 ||
      all->imports_format != DYLD_CHAINED_IMPORT)
    refuse(image, "unknown fixup format: version %u, imports of format %u",
           all->fixups_version, all->imports_format);
  import = in_fixups(image, all->imports_offset,
                     (uint64_t)all->imports_count * sizeof *import);
  uint64_t* targets = calloc(all->imports_count + 1ull, sizeof *targets);
  if (targets == NULL) refuse(image, "no room for its imports");
  for (uint32_t i = 0; i < all->imports_count; i++, import++) {
    uint64_t at = (uint64_t)all->symbols_offset + import->name_offset;
    const char* name = in_fixups(image, at, 1);
    if (!memchr(name, 0, image->fixups.size - at))
      refuse(image, "truncated: the name of an import is behind its end");
    targets[i] = (uint64_t)bind_symbol(image, (int8_t)import->lib_ordinal, name,
                                       import->weak_import);
  }
  return targets;
}

static void follow_chain(const Image* image, uint8_t* at, const uint8_t* end,
                         const uint64_t* targets, uint32_t count) {
  for (uint64_t next = 1; next != 0; at += 4 * next) {
    if (at + 8 > end)
      refuse(image, "damaged: a chain of fixups leaves its page");
    union {
      uint64_t value;
      struct dyld_chained_ptr_64_bind bind;
      struct dyld_chained_ptr_64_rebase rebase;
    } raw;
    memcpy(&raw, at, 8);
    next = raw.bind.next;
    if (raw.bind.bind && raw.bind.ordinal >= count)
      refuse(image, "damaged: import %u of %u", (unsigned)raw.bind.ordinal,
             count);
    if (!raw.bind.bind) check_target(image, raw.rebase.target);
    raw.value = raw.bind.bind
                    ? targets[raw.bind.ordinal] + raw.bind.addend
                    : ((uint64_t)image->base + raw.rebase.target) |
                          (uint64_t)raw.rebase.high8 << 56;
    memcpy(at, &raw, 8);
  }
}

static void fix_segment(const Image* image, const Segment* segment,
                        const ChainedStarts* starts, const uint64_t* targets,
                        uint32_t count) {
  if (starts->pointer_format != DYLD_CHAINED_PTR_64_OFFSET)
    refuse(image, "unknown fixup format: pointers of format %u",
           starts->pointer_format);
  uint64_t page_size = starts->page_size;
  if (page_size != kPage && page_size != 4096)
    refuse(image, "unknown fixup format: pages of %lu bytes", page_size);
  if (starts->segment_offset != segment->command->vmaddr - image->preferred ||
      starts->page_count > (segment->size + page_size - 1) / page_size)
    refuse(image, "damaged: fixups of another segment than %.16s",
           segment->command->segname);
  check_writable(image, segment);
  for (int page = 0; page < starts->page_count; page++) {
    uint16_t start = starts->page_start[page];
    if (start == DYLD_CHAINED_PTR_START_NONE) continue;
    if (start & DYLD_CHAINED_PTR_START_MULTI)
      refuse(image, "unknown fixup format: several chains in a page");
    uint8_t* at = segment->start + page * page_size;
    uint64_t left = segment->size - page * page_size;
    // The last of a page may go on in the next.
    uint64_t end = left < page_size + 7 ? left : page_size + 7;
    follow_chain(image, at + start, at + end, targets, count);
  }
}

static void apply_chained(Image* image) {
  const struct dyld_chained_fixups_header* all =
      in_fixups(image, 0, sizeof *all);
  uint64_t* targets = import_targets(image, all);
  const uint32_t* count = in_fixups(image, all->starts_offset, 4);
  if (*count != (uint32_t)image->segment_count)
    refuse(image, "damaged: fixups of %u segments", *count);
  const uint32_t* offsets =
      in_fixups(image, all->starts_offset + 4ull, 4ull * *count);
  for (uint32_t i = 0; i < *count; i++) {
    if (offsets[i] == 0) continue;
    uint64_t at = (uint64_t)all->starts_offset + offsets[i];
    const ChainedStarts* starts = in_fixups(image, at, sizeof *starts);
    in_fixups(image, at,
              offsetof(ChainedStarts, page_start) + 2ull * starts->page_count);
    fix_segment(image, &image->segments[i], starts, targets,
                all->imports_count);
  }
  free(targets);
}

// ---- opcodes ---------------------------------------------------------------

typedef struct Opcodes Opcodes;
typedef uint64_t Fix(const Opcodes*, uint64_t before);

struct Opcodes {
  Image* image;
  const uint8_t *at, *end;
  Fix* fix;  // what comes into a place
  unsigned segment;
  int ordinal;
  uint64_t offset, addend;
  const char* name;
  bool weak_import;
};

static uint64_t rebased(const Opcodes* o, uint64_t before) {
  // The highest byte may hold a mark, as in the names of libc++'s types.
  check_target(o->image, (before << 8 >> 8) - o->image->preferred);
  return before + (uint64_t)o->image->base - o->image->preferred;
}
static uint64_t bound(const Opcodes* o, uint64_t before) {
  (void)before;
  return o->addend + (uint64_t)bind_symbol(o->image, o->ordinal, o->name,
                                           o->weak_import);
}
// Where nobody exports it, the image's own private one stays.
static uint64_t bound_weakly(const Opcodes* o, uint64_t before) {
  void* found = coalesced(o->name);
  return found ? o->addend + (uint64_t)found : before;
}

static uint64_t uleb(Opcodes* o) { return read_uleb(o->image, &o->at, o->end); }

// Fixes `count` places, each `skip` bytes behind the one before.
static void fix(Opcodes* o, uint64_t count, uint64_t skip) {
  for (; count > 0; count--, o->offset += 8 + skip) {
    const Image* image = o->image;
    const Segment* segment = &image->segments[o->segment];
    if (o->segment >= (unsigned)image->segment_count || segment->size < 8 ||
        o->offset > segment->size - 8 || skip > segment->size)
      refuse(image, "damaged: a fixup outside of its segment");
    check_writable(image, segment);
    if (o->name == NULL && o->fix != rebased)
      refuse(image, "damaged: an import without a name");
    uint64_t* place = (uint64_t*)(segment->start + o->offset);
    *place = o->fix(o, *place);
  }
}

static void set_name(Opcodes* o) {
  const uint8_t* end = memchr(o->at, 0, (size_t)(o->end - o->at));
  if (end == NULL) refuse(o->image, "truncated: a name without an end");
  o->name = (const char*)o->at;
  o->at = end + 1;
}

// What most opcodes do: fix `count` places that lie `skip` apart, and go on by
// `add`. Each of these is nothing, one, the opcode's immediate, eight times
// that, or a number that follows.
typedef enum { kNone, kOne, kImmediate, kScaled, kUleb } Operand;
typedef struct {
  uint8_t opcode;
  Operand count, skip, add;
} Step;
static const Step kRebaseSteps[] = {
    {REBASE_OPCODE_ADD_ADDR_ULEB, kNone, kNone, kUleb},
    {REBASE_OPCODE_ADD_ADDR_IMM_SCALED, kNone, kNone, kScaled},
    {REBASE_OPCODE_DO_REBASE_IMM_TIMES, kImmediate, kNone, kNone},
    {REBASE_OPCODE_DO_REBASE_ULEB_TIMES, kUleb, kNone, kNone},
    {REBASE_OPCODE_DO_REBASE_ADD_ADDR_ULEB, kOne, kNone, kUleb},
    {REBASE_OPCODE_DO_REBASE_ULEB_TIMES_SKIPPING_ULEB, kUleb, kUleb, kNone},
};
static const Step kBindSteps[] = {
    {BIND_OPCODE_ADD_ADDR_ULEB, kNone, kNone, kUleb},
    {BIND_OPCODE_DO_BIND, kOne, kNone, kNone},
    {BIND_OPCODE_DO_BIND_ADD_ADDR_ULEB, kOne, kNone, kUleb},
    {BIND_OPCODE_DO_BIND_ADD_ADDR_IMM_SCALED, kOne, kNone, kScaled},
    {BIND_OPCODE_DO_BIND_ULEB_TIMES_SKIPPING_ULEB, kUleb, kUleb, kNone},
};

static uint64_t operand(Opcodes* o, Operand kind, uint8_t immediate) {
  if (kind == kUleb) return uleb(o);
  return kind == kNone ? 0 : kind == kOne ? 1 : immediate * (kind == kScaled ? 8 : 1);
}

static void run_step(Opcodes* o, uint8_t opcode, uint8_t immediate) {
  bool rebases = o->fix == rebased;
  const Step* step = rebases ? kRebaseSteps : kBindSteps;
  size_t left = rebases ? sizeof kRebaseSteps / sizeof *step
                        : sizeof kBindSteps / sizeof *step;
  for (; left > 0 && step->opcode != opcode; left--) step++;
  if (left == 0)
    refuse(o->image, "unknown fixup format: %s opcode %#x",
           rebases ? "rebase" : "bind", opcode);
  uint64_t count = operand(o, step->count, immediate);
  fix(o, count, operand(o, step->skip, immediate));
  o->offset += operand(o, step->add, immediate);
}

static void set_place(Opcodes* o, uint8_t segment) {
  o->segment = segment;
  o->offset = uleb(o);
}

static void check_type(const Opcodes* o, uint8_t type) {
  if (type != BIND_TYPE_POINTER)  // of rebasing, too
    refuse(o->image, "unknown fixup format: type %u", type);
}

static void rebase_one(Opcodes* o, uint8_t opcode, uint8_t immediate) {
  if (opcode == REBASE_OPCODE_SET_TYPE_IMM)
    check_type(o, immediate);
  else if (opcode == REBASE_OPCODE_SET_SEGMENT_AND_OFFSET_ULEB)
    set_place(o, immediate);
  else
    run_step(o, opcode, immediate);
}

static void bind_one(Opcodes* o, uint8_t opcode, uint8_t immediate) {
  switch (opcode) {
    case BIND_OPCODE_SET_TYPE_IMM:
      return check_type(o, immediate);
    case BIND_OPCODE_SET_SEGMENT_AND_OFFSET_ULEB:
      return set_place(o, immediate);
    case BIND_OPCODE_SET_DYLIB_ORDINAL_IMM:
      o->ordinal = immediate;
      return;
    case BIND_OPCODE_SET_DYLIB_ORDINAL_ULEB:
      o->ordinal = (int)uleb(o);
      return;
    case BIND_OPCODE_SET_DYLIB_SPECIAL_IMM:
      o->ordinal = immediate ? (int8_t)(0xf0 | immediate) : 0;
      return;
    case BIND_OPCODE_SET_SYMBOL_TRAILING_FLAGS_IMM:
      o->weak_import = immediate & BIND_SYMBOL_FLAGS_WEAK_IMPORT;
      return set_name(o);
    case BIND_OPCODE_SET_ADDEND_SLEB:
      o->addend = (uint64_t)read_sleb(o->image, &o->at, o->end);
      return;
    default:
      run_step(o, opcode, immediate);
  }
}

enum { kOnce, kLazily };

static void run_opcodes(Image* image, uint32_t offset, uint32_t size, Fix* how,
                        int when) {
  Opcodes o = {.image = image, .fix = how};
  o.at = file_range(image, offset, size, "opcodes");
  o.end = o.at + size;
  while (o.at < o.end) {
    uint8_t byte = *o.at++, opcode = byte & BIND_OPCODE_MASK;
    if (opcode != BIND_OPCODE_DONE)
      (how == rebased ? rebase_one : bind_one)(&o, opcode, byte & 0x0f);
    else if (when == kOnce)  // lazily: it is the end of one
      return;
  }
}

void apply_fixups(Image* image) {
  const struct dyld_info_command* info = image->dyld_info;
  if (image->fixups.size > 0) return apply_chained(image);
  if (info == NULL)
    refuse(image, "unknown fixup format: neither chained nor opcodes");
  run_opcodes(image, info->rebase_off, info->rebase_size, rebased, kOnce);
  run_opcodes(image, info->bind_off, info->bind_size, bound, kOnce);
  run_opcodes(image, info->lazy_bind_off, info->lazy_bind_size, bound, kLazily);
  run_opcodes(image, info->weak_bind_off, info->weak_bind_size, bound_weakly,
              kOnce);
}
