// Reads, checks and maps a Mach-O file.
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "machrun.h"

Image g_images[kImagesMax];
int g_image_count;

// Also from a handler of a signal: takes no lock. Names may be of a damaged file:
// the line stays one.
_Noreturn void refuse(const Image* image, const char* format, ...) {
  char line[2048];
  va_list list;
  va_start(list, format);
  int size = snprintf(line, sizeof line / 2, "machrun: %s: ",
                      image ? image->path : "libSystem");
  vsnprintf(line + size, sizeof line / 2, format, list);
  va_end(list);
  char* at = line;
  for (; *at != '\0'; at++)
    if ((uint8_t)*at < ' ' || *at == 0x7f) *at = '?';
  *at++ = '\n';
  size = (int)write(STDERR_FILENO, line, (size_t)(at - line));
  _exit(2);
}

const void* file_range(const Image* image, uint64_t offset, uint64_t size,
                       const char* what) {
  if (offset > image->file_size || size > image->file_size - offset)
    refuse(image, "truncated: its %s ends behind the file", what);
  return image->file + offset;
}

uint8_t* at_address(const Image* image, uint64_t address, uint64_t size) {
  uint64_t offset = address - image->preferred;
  if (offset > image->size || size > image->size - offset)
    refuse(image, "damaged: an address outside of its segments");
  return image->base + offset;
}

Image* image_of(const void* address) {
  for (int i = 0; i < g_image_count; i++) {
    Image* image = &g_images[i];
    if ((uint64_t)((const uint8_t*)address - image->base) < image->size)
      return image;
  }
  return NULL;
}

// ---- load commands ---------------------------------------------------------

void each_command(Image* image, void (*visit)(Image*, const LoadCommand*)) {
  uint64_t at = sizeof(MachHeader);
  for (uint32_t i = ((const MachHeader*)image->file)->ncmds; i > 0; i--) {
    // The largest: so that whatever is read of a shorter one is in the file.
    const LoadCommand* command =
        file_range(image, at, sizeof(SegmentCommand), "load command");
    if (command->cmdsize < sizeof *command || command->cmdsize % 8)
      refuse(image, "damaged: a load command of %u bytes", command->cmdsize);
    file_range(image, at, command->cmdsize, "load command");
    at += command->cmdsize;
    if (at > sizeof(MachHeader) + ((const MachHeader*)image->file)->sizeofcmds)
      refuse(image, "damaged: a load command behind the last");
    visit(image, command);
  }
}

const char* command_text(const Image* image, const LoadCommand* command,
                         uint32_t offset) {
  const char* text = (const char*)command + offset;
  if (offset >= command->cmdsize ||
      !memchr(text, '\0', command->cmdsize - offset))
    refuse(image, "damaged: the text of a load command has no end");
  return text;
}

static void each_section(Image* image, void (*visit)(Image*, const Section*)) {
  for (int i = 0; i < image->segment_count; i++) {
    const SegmentCommand* segment = image->segments[i].command;
    const Section* sections = (const Section*)(segment + 1);
    for (uint32_t j = 0; j < segment->nsects; j++) visit(image, &sections[j]);
  }
}

bool is_code(const Image* image, const void* address) {
  uint64_t wanted = (uint64_t)((const uint8_t*)address - image->base);
  for (int i = 0; i < image->segment_count; i++) {
    const SegmentCommand* segment = image->segments[i].command;
    const Section* section = (const Section*)(segment + 1);
    for (uint32_t left = segment->nsects; left > 0; left--, section++)
      if (wanted - (section->addr - image->preferred) < section->size)
        return section->flags & S_ATTR_SOME_INSTRUCTIONS;
  }
  return false;
}

enum { kCpuArm64 = 0x0100000c, kCpuX86_64 = 0x01000007, kFat = 0xbebafeca };

static void check_header(const Image* image) {
  const MachHeader* header =
      file_range(image, 0, sizeof *header, "Mach-O header");
  if (header->magic == kFat)
    refuse(image, "for more than one architecture: only arm64 is loaded");
  if (header->magic != MH_MAGIC_64)
    refuse(image, "not a Mach-O file of 64 bits");
  if (header->cputype != kCpuArm64)
    refuse(image, "for %s, not for arm64",
           header->cputype == kCpuX86_64 ? "x86_64" : "another processor");
  if (header->cpusubtype & 0xffffff)
    refuse(image, "for arm64e or another kind of arm64 than is pretended");
  if (header->filetype != MH_DYLIB && header->filetype != MH_BUNDLE)
    refuse(image, "neither a dylib nor a bundle (type %u)", header->filetype);
  if (!(header->flags & MH_TWOLEVEL))
    refuse(image, "its imports do not say of which library they are");
}

static void check_platform(Image* image, const LoadCommand* command) {
  const struct build_version_command* build = (const void*)command;
  if (build->platform != PLATFORM_MACOS)
    refuse(image, "for platform %u, not for macOS", build->platform);
  if (build->minos > g_pretends)
    refuse(image, "needs macOS %u.%u, and %u.%u is pretended",
           build->minos >> 16, build->minos >> 8 & 0xff, g_pretends >> 16,
           g_pretends >> 8 & 0xff);
  image->is_for_macos = true;
}

static void add_segment(Image* image, const LoadCommand* command) {
  const SegmentCommand* segment = (const void*)command;
  if (segment->cmdsize < sizeof *segment + segment->nsects * sizeof(Section))
    refuse(image, "damaged: a segment has no room for its sections");
  if (image->segment_count == kSegmentsMax) refuse(image, "too many segments");
  file_range(image, segment->fileoff, segment->filesize, "segment");
  if ((segment->initprot & 6) == 6)
    refuse(image, "segment %.16s is writable and executable", segment->segname);
  if (segment->initprot & ~segment->maxprot || segment->initprot & ~7)
    refuse(image, "segment %.16s asks for more than it may", segment->segname);
  if (image->segment_count == 0 &&
      (segment->fileoff != 0 || segment->filesize < sizeof(MachHeader)))
    refuse(image, "damaged: its first segment lacks the header");
  // As dyld wants them: in order, so that none lies on another.
  uint64_t last = image->preferred + image->size, end;
  if (image->segment_count == 0) image->preferred = last = segment->vmaddr;
  if (segment->filesize > segment->vmsize || segment->vmaddr < last ||
      segment->vmaddr % kPage ||
      __builtin_add_overflow(segment->vmaddr, segment->vmsize, &end) ||
      end - image->preferred > UINT32_MAX)
    refuse(image, "damaged: segment %.16s lies badly", segment->segname);
  image->size = (end - image->preferred + kPage - 1) & ~(kPage - 1ull);
  image->segments[image->segment_count++] =
      (Segment){NULL, segment->vmsize, segment};
  const Section* section = (const Section*)(segment + 1);
  for (uint32_t i = 0; i < segment->nsects; i++, section++)
    if (section->addr < segment->vmaddr || section->addr > end ||
        section->size > end - section->addr)
      refuse(image, "damaged: section %.16s lies badly", section->sectname);
}

static Range linkedit(const Image* image, uint32_t offset, uint64_t size,
                      const char* what) {
  file_range(image, offset, size, what);
  return (Range){offset, (uint32_t)size};
}

static void read_symtab(Image* image, const struct symtab_command* table) {
  linkedit(image, table->symoff, sizeof(struct nlist_64) * table->nsyms,
           "symbol table");
  const char* names = file_range(image, table->stroff, table->strsize,
                                 "names of symbols");
  if (table->strsize > 0 && names[table->strsize - 1] != '\0')
    refuse(image, "damaged: the names of its symbols have no end");
  image->symtab = table;
}

static void add_run_path(Image* image, const LoadCommand* command) {
  const struct rpath_command* path = (const void*)command;
  if (image->run_path_count == kDependentsMax)
    refuse(image, "too many run paths");
  image->run_paths[image->run_path_count++] =
      command_text(image, command, path->path.offset);
}

static void read_command(Image* image, const LoadCommand* command) {
  const struct linkedit_data_command* data = (const void*)command;
  const struct dyld_info_command* info = (const void*)command;
  const struct dylib_command* dylib = (const void*)command;
  switch (command->cmd) {
    case LC_SEGMENT_64:
      return add_segment(image, command);
    case LC_BUILD_VERSION:
      return check_platform(image, command);
    case LC_SYMTAB:
      return read_symtab(image, (const void*)command);
    case LC_DYLD_INFO_ONLY:
      image->dyld_info = info;
      image->exports =
          linkedit(image, info->export_off, info->export_size, "exports");
      return;
    case LC_DYLD_CHAINED_FIXUPS:
      image->fixups = linkedit(image, data->dataoff, data->datasize, "fixups");
      return;
    case LC_DYLD_EXPORTS_TRIE:
      image->exports =
          linkedit(image, data->dataoff, data->datasize, "exports");
      return;
    case LC_CODE_SIGNATURE:
      image->signature =
          linkedit(image, data->dataoff, data->datasize, "signature");
      return;
    case LC_ID_DYLIB:
      image->install_name =
          command_text(image, command, dylib->dylib.name.offset);
      return;
    case LC_RPATH:
      return add_run_path(image, command);
    case LC_LOAD_DYLIB:
    case LC_LOAD_WEAK_DYLIB:
      return;  // later
    // For debuggers and linkers; dyld does nothing for them.
    case LC_UUID:
    case LC_LOAD_DYLINKER:  // zig writes it into dylibs, too
    case LC_DYSYMTAB:
    case LC_SOURCE_VERSION:
    case LC_FUNCTION_STARTS:
    case LC_DATA_IN_CODE:
    case LC_LINKER_OPTIMIZATION_HINT:
    case LC_NOTE:
      return;
    default:
      if (command->cmd & LC_REQ_DYLD)
        refuse(image, "unknown load command %#x that dyld must know",
               command->cmd);
      refuse(image, "nobody has reviewed the load command %#x", command->cmd);
  }
}

static void check_section(Image* image, const Section* section) {
  uint64_t offset = section->addr - image->preferred;
  Range place = {(uint32_t)offset, (uint32_t)section->size};
  if (!strncmp(section->sectname, "__eh_frame", 16)) image->eh_frame = place;
  if (!strncmp(section->sectname, "__unwind_info", 16))
    image->unwind_info = place;
  uint32_t kind = section->flags & SECTION_TYPE;
  if (kind == S_THREAD_LOCAL_VARIABLES &&
      !(((const MachHeader*)image->file)->flags & MH_HAS_TLV_DESCRIPTORS))
    refuse(image, "its header does not tell of the thread's variables it has");
  if (kind != S_THREAD_LOCAL_REGULAR && kind != S_THREAD_LOCAL_ZEROFILL) return;
  if (section->align > 6)
    refuse(image, "a thread's variable is aligned to more than 64 bytes");
  Range* whole = &image->thread_template;
  if (whole->size == 0) whole->offset = place.offset;
  if (place.offset < whole->offset)
    refuse(image, "damaged: section %.16s lies badly", section->sectname);
  whole->size = place.offset + place.size - whole->offset;
}

// ---- mapping ---------------------------------------------------------------

static void lay_out(Image* image) {
  if (image->segment_count == 0) refuse(image, "it has no segments");
  uint8_t* room = mmap(NULL, image->size + kPage, PROT_NONE,
                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (room == MAP_FAILED)
    refuse(image, "no room for its %lu bytes", image->size);
  image->base = (uint8_t*)(((uintptr_t)room + kPage - 1) & -(uintptr_t)kPage);
}

// As the file asks: code is never writable, and what it does not ask for is not
// there.
static void map_segments(Image* image, int file) {
  for (int i = 0; i < image->segment_count; i++) {
    Segment* segment = &image->segments[i];
    const SegmentCommand* command = segment->command;
    segment->start = image->base + (command->vmaddr - image->preferred);
    int protection = (int)command->initprot & 7;
    uint64_t size = command->filesize, mapped = (size + 4095) & ~4095ull;
    bool fits =
        size == 0 ||
        mmap(segment->start, size, protection, MAP_PRIVATE | MAP_FIXED, file,
             (off_t)command->fileoff) != MAP_FAILED;
    if (fits && command->vmsize > mapped)
      fits = mmap(segment->start + mapped, command->vmsize - mapped, protection,
                  MAP_PRIVATE | MAP_FIXED | MAP_ANONYMOUS, -1,
                  0) != MAP_FAILED;
    if (!fits)
      refuse(image, "segment %.16s cannot be mapped", command->segname);
    // The file goes on behind the segment's part of it.
    if (protection & PROT_WRITE && size < mapped)
      memset(segment->start + size, 0, mapped - size);
  }
}

static void protect_constants(const Image* image) {
  for (int i = 0; i < image->segment_count; i++) {
    const Segment* segment = &image->segments[i];
    if (segment->command->flags & SG_READ_ONLY)
      mprotect(segment->start, (segment->size + 4095) & ~4095ull, PROT_READ);
  }
}

static void add_dependent(Image* image, const LoadCommand* command) {
  bool weak = command->cmd == LC_LOAD_WEAK_DYLIB;
  if (command->cmd != LC_LOAD_DYLIB && !weak) return;
  if (image->dependent_count == kDependentsMax)
    refuse(image, "too many libraries");
  const struct dylib_command* dylib = (const void*)command;
  const char* name = command_text(image, command, dylib->dylib.name.offset);
  image->dependents[image->dependent_count++] =
      find_library(name, image, weak);
}

static void thread_variables(Image* image, const Section* section) {
  if ((section->flags & SECTION_TYPE) == S_THREAD_LOCAL_VARIABLES)
    set_up_thread_variables(image, section);
}

static void run_initialisers(Image* image, const Section* section) {
  extern char** environ;
  static char *arguments[] = {"machrun", NULL}, *apple[] = {NULL};
  bool offsets = (section->flags & SECTION_TYPE) == S_INIT_FUNC_OFFSETS;
  if (!offsets &&
      (section->flags & SECTION_TYPE) != S_MOD_INIT_FUNC_POINTERS)
    return;
  uint8_t* at = at_address(image, section->addr, section->size);
  size_t step = offsets ? sizeof(uint32_t) : sizeof(uint64_t);
  for (uint64_t i = 0; i < section->size / step; i++) {
    uint64_t code = offsets ? image->preferred + ((uint32_t*)at)[i]
                            : ((uint64_t*)at)[i] - (uint64_t)image->base +
                                  image->preferred;
    void (*start)(int, char**, char**, char**) =
        (void*)at_address(image, code, 4);
    start(1, arguments, environ, apple);
  }
}

// ---- all of it -------------------------------------------------------------

static const Image* g_loading;

static void on_damage(int number) {
  refuse(g_loading, "damaged: %s while it was loaded", strsignal(number));
}

// Fixes an image up and initialises it. Damage that only shows when it is used,
// a fault or an abort, is told as the image's.
static void bring_up(Image* image) {
  enum { kCount = 5 };
  static const int kFaults[] = {SIGSEGV, SIGBUS, SIGILL, SIGTRAP, SIGABRT};
  struct sigaction own = {.sa_handler = on_damage}, before[kCount];
  const Image* outer = g_loading;
  g_loading = image;
  for (int i = 0; i < kCount; i++) sigaction(kFaults[i], &own, &before[i]);
  each_command(image, add_dependent);
  apply_fixups(image);
  each_section(image, thread_variables);
  protect_constants(image);
  each_section(image, run_initialisers);
  for (int i = 0; i < kCount; i++) sigaction(kFaults[i], &before[i], NULL);
  g_loading = outer;
}

static int open_file(Image* image) {
  int file = open(image->path, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
  struct stat found;
  if (file < 0 || fstat(file, &found) != 0 || !S_ISREG(found.st_mode))
    refuse(image, "it cannot be read");
  image->file_size = (uint64_t)found.st_size;
  image->file =
      mmap(NULL, image->file_size + 1, PROT_READ, MAP_PRIVATE, file, 0);
  if (image->file == MAP_FAILED) refuse(image, "it cannot be read");
  return file;
}

Image* load_image(const char* path, const Image* loader, bool quiet) {
  char* real = realpath(path, NULL);
  if (real == NULL && quiet) return NULL;
  for (int i = 0; i < g_image_count; i++)
    if (real && !strcmp(g_images[i].path, real)) return &g_images[i];
  if (g_image_count == kImagesMax) refuse(loader, "too many images");
  Image* image = &g_images[g_image_count];
  *image = (Image){.number = g_image_count};
  snprintf(image->path, sizeof image->path, "%s", path);
  if (real == NULL) refuse(image, "there is no such file");
  if (strlen(real) >= sizeof image->path) refuse(loader, "%s: too long", path);
  strcpy(image->path, real);
  free(real);
  int file = open_file(image);
  check_header(image);
  each_command(image, read_command);
  if (!image->is_for_macos) refuse(image, "it does not say that it is for macOS");
  if (image->install_name == NULL &&
      ((const MachHeader*)image->file)->filetype == MH_DYLIB)
    refuse(image, "damaged: a dylib without a name");
  lay_out(image);
  each_section(image, check_section);
  check_signature(image);
  map_segments(image, file);
  close(file);
  g_image_count++;
  bring_up(image);
  return image;
}
