// Reads, checks and maps a Mach-O file.
#include <fcntl.h>
#include <libgen.h>
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
int g_verbose;
uint32_t g_pretends = 14 << 16;

_Noreturn void refuse(const Image* image, const char* format, ...) {
  char text[1024];
  va_list list;
  va_start(list, format);
  vsnprintf(text, sizeof text, format, list);
  va_end(list);
  fprintf(stderr, "machrun: %s: %s\n", image ? image->path : "libSystem", text);
  fflush(NULL);
  _exit(2);
}

const void* file_range(const Image* image, uint64_t offset, uint64_t size,
                       const char* what) {
  if (offset > image->file_size || size > image->file_size - offset)
    refuse(image, "truncated: its %s ends behind the file", what);
  return image->file + offset;
}

uint8_t* at_address(const Image* image, uint64_t address) {
  uint64_t offset = address - image->preferred;
  if (offset >= image->size)
    refuse(image, "an address outside of its segments");
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

static const LoadCommand* command_at(const Image* image, uint64_t* at,
                                     size_t least) {
  const LoadCommand* command =
      file_range(image, *at, sizeof(LoadCommand), "load command");
  if (command->cmdsize < least || command->cmdsize % 8)
    refuse(image, "damaged: a load command of %u bytes", command->cmdsize);
  file_range(image, *at, command->cmdsize, "load command");
  *at += command->cmdsize;
  return command;
}

static void each_command(Image* image,
                         void (*visit)(Image*, const LoadCommand*)) {
  const MachHeader* header = (const MachHeader*)image->file;
  uint64_t at = sizeof *header;
  for (uint32_t i = 0; i < header->ncmds; i++)
    visit(image, command_at(image, &at, sizeof(LoadCommand)));
}

void each_section(Image* image, void (*visit)(Image*, const Section*)) {
  for (int i = 0; i < image->segment_count; i++) {
    const SegmentCommand* segment = image->segments[i].command;
    const Section* sections = (const Section*)(segment + 1);
    for (uint32_t j = 0; j < segment->nsects; j++) visit(image, &sections[j]);
  }
}

static void check_header(const Image* image) {
  const MachHeader* header =
      file_range(image, 0, sizeof *header, "Mach-O header");
  if (header->magic == kFatMagic)
    refuse(image, "for more than one architecture: only arm64 is loaded");
  if (header->magic != kMagic64) refuse(image, "not a Mach-O file of 64 bits");
  if (header->cputype != kCpuArm64)
    refuse(image, "for %s, not for arm64",
           header->cputype == kCpuX86_64 ? "x86_64" : "another processor");
  if (header->cpusubtype & 0xffffff)
    refuse(image, "for arm64e or another kind of arm64 than is pretended");
  if (header->filetype != kDylib && header->filetype != kBundle)
    refuse(image, "neither a dylib nor a bundle (type %u)", header->filetype);
}

static void check_platform(const Image* image, const LoadCommand* command) {
  const BuildVersionCommand* build = (const void*)command;
  if (build->platform != kPlatformMacos)
    refuse(image, "for platform %u, not for macOS", build->platform);
  if (build->minos > g_pretends)
    refuse(image, "needs macOS %u.%u, and %u.%u is pretended",
           build->minos >> 16, build->minos >> 8 & 0xff, g_pretends >> 16,
           g_pretends >> 8 & 0xff);
}

static void add_segment(Image* image, const LoadCommand* command) {
  const SegmentCommand* segment = (const void*)command;
  if (segment->cmdsize < sizeof *segment + segment->nsects * sizeof(Section))
    refuse(image, "damaged: segment %.16s has no room for its sections",
           segment->segname);
  if (image->segment_count == kSegmentsMax) refuse(image, "too many segments");
  file_range(image, segment->fileoff, segment->filesize, segment->segname);
  if ((segment->initprot & 6) == 6)
    refuse(image, "segment %.16s is writable and executable", segment->segname);
  if (segment->filesize > segment->vmsize || segment->vmsize > 1ull << 40 ||
      segment->vmaddr % kPage)
    refuse(image, "damaged: segment %.16s lies badly", segment->segname);
  image->segments[image->segment_count++] =
      (Segment){NULL, segment->vmsize, segment};
}

static Range linkedit(const Image* image, const LoadCommand* command,
                      const char* what) {
  const LinkeditCommand* data = (const void*)command;
  file_range(image, data->dataoff, data->datasize, what);
  return (Range){data->dataoff, data->datasize};
}

static void read_command(Image* image, const LoadCommand* command) {
  switch (command->cmd) {
    case kLcSegment64:
      return add_segment(image, command);
    case kLcBuildVersion:
      return check_platform(image, command);
    case kLcSymtab:
      image->symtab = (const void*)command;
      return;
    case kLcDyldInfo:
    case kLcDyldInfoOnly:
      image->dyld_info = (const void*)command;
      image->exports = image->dyld_info->exported;
      return;
    case kLcChainedFixups:
      image->fixups = linkedit(image, command, "fixups");
      return;
    case kLcExportsTrie:
      image->exports = linkedit(image, command, "exports");
      return;
    case kLcCodeSignature:
      image->signature = linkedit(image, command, "signature");
      return;
    case kLcIdDylib:
      image->install_name =
          (const char*)command + ((const DylibCommand*)command)->name;
      return;
    case kLcLoadDylib:
    case kLcLoadWeakDylib:
    case kLcRpath:
      return;  // later
    default:
      if (command->cmd & kLcReqDyld)
        refuse(image, "unknown load command %#x that dyld must know",
               command->cmd);
  }
}

static void check_sections(Image* image, const Section* section) {
  uint64_t offset = section->addr - image->preferred;
  if (offset > image->size || section->size > image->size - offset)
    refuse(image, "damaged: section %.16s lies badly", section->sectname);
  Range place = {(uint32_t)offset, (uint32_t)section->size};
  if (!strncmp(section->sectname, "__eh_frame", 16)) image->eh_frame = place;
  if (!strncmp(section->sectname, "__unwind_info", 16))
    image->unwind_info = place;
  uint32_t kind = section->flags & 0xff;
  if (kind != kThreadLocalRegular && kind != kThreadLocalZerofill) return;
  Range* whole = &image->thread_template;
  if (whole->size == 0) whole->offset = place.offset;
  whole->size = place.offset + place.size - whole->offset;
}

// ---- mapping ---------------------------------------------------------------

static void lay_out(Image* image) {
  uint64_t low = UINT64_MAX, high = 0;
  for (int i = 0; i < image->segment_count; i++) {
    const SegmentCommand* segment = image->segments[i].command;
    if (segment->vmaddr < low) low = segment->vmaddr;
    if (segment->vmaddr + segment->vmsize > high)
      high = segment->vmaddr + segment->vmsize;
  }
  if (image->segment_count == 0) refuse(image, "it has no segments");
  image->preferred = low;
  image->size = (high - low + kPage - 1) & ~(uint64_t)(kPage - 1);
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
    if (command->filesize > 0 && mmap(segment->start, command->filesize,
                                      protection, MAP_PRIVATE | MAP_FIXED, file,
                                      (off_t)command->fileoff) == MAP_FAILED)
      refuse(image, "segment %.16s cannot be mapped", command->segname);
    uint64_t mapped = (command->filesize + 4095) & ~4095ull;
    if (command->vmsize > mapped &&
        mmap(segment->start + mapped, command->vmsize - mapped, protection,
             MAP_PRIVATE | MAP_FIXED | MAP_ANONYMOUS, -1, 0) == MAP_FAILED)
      refuse(image, "segment %.16s cannot be mapped", command->segname);
    // The file goes on behind the segment's part of it.
    if (protection & PROT_WRITE && command->filesize < mapped)
      memset(segment->start + command->filesize, 0, mapped - command->filesize);
  }
}

static void protect_constants(const Image* image) {
  for (int i = 0; i < image->segment_count; i++) {
    const Segment* segment = &image->segments[i];
    if (segment->command->flags & kReadOnlyAfterFixups)
      mprotect(segment->start, (segment->size + 4095) & ~4095ull, PROT_READ);
  }
}

static void add_dependent(Image* image, const LoadCommand* command) {
  if (command->cmd != kLcLoadDylib && command->cmd != kLcLoadWeakDylib) return;
  const char* name =
      (const char*)command + ((const DylibCommand*)command)->name;
  if (image->dependent_count == kDependentsMax)
    refuse(image, "too many libraries");
  Library found = find_library(name, image, command->cmd == kLcLoadWeakDylib);
  image->dependents[image->dependent_count++] = found;
}

static void thread_variables(Image* image, const Section* section) {
  if ((section->flags & 0xff) == kThreadLocalVariables)
    set_up_thread_variables(image, section);
}

static void run_initialisers(Image* image, const Section* section) {
  extern char** environ;
  static char *arguments[] = {"machrun", NULL}, *apple[] = {NULL};
  uint32_t kind = section->flags & 0xff;
  if (kind != kModInitFuncs && kind != kInitOffsets) return;
  uint8_t* at = at_address(image, section->addr);
  size_t step = kind == kInitOffsets ? sizeof(uint32_t) : sizeof(uint64_t);
  for (uint64_t i = 0; i < section->size / step; i++) {
    uint8_t* code = kind == kInitOffsets ? image->base + ((uint32_t*)at)[i]
                                         : (uint8_t*)((uint64_t*)at)[i];
    void (*start)(int, char**, char**, char**) = (void*)code;
    start(1, arguments, environ, apple);
  }
}

Image* load_image(const char* path, const Image* loader, bool quiet) {
  char real[512];
  if (realpath(path, real) == NULL || strlen(path) >= sizeof real) {
    if (quiet) return NULL;
    refuse(loader, "%s: there is no such file", path);
  }
  for (int i = 0; i < g_image_count; i++)
    if (!strcmp(g_images[i].path, real)) return &g_images[i];
  if (g_image_count == kImagesMax) refuse(loader, "too many images");
  Image* image = &g_images[g_image_count];
  memset(image, 0, sizeof *image);
  image->number = g_image_count;
  strcpy(image->path, real);
  int file = open(real, O_RDONLY | O_CLOEXEC);
  struct stat found;
  if (file < 0 || fstat(file, &found) != 0 || !S_ISREG(found.st_mode))
    refuse(image, "it cannot be read");
  image->file_size = (uint64_t)found.st_size;
  image->file =
      mmap(NULL, image->file_size + 1, PROT_READ, MAP_PRIVATE, file, 0);
  if (image->file == MAP_FAILED) refuse(image, "it cannot be read");
  check_header(image);
  image->weak_defines =
      (((const MachHeader*)image->file)->flags & kWeakDefines) != 0;
  each_command(image, read_command);
  lay_out(image);
  each_section(image, check_sections);
  check_signature(image);
  map_segments(image, file);
  close(file);
  g_image_count++;
  each_command(image, add_dependent);
  apply_fixups(image);
  each_section(image, thread_variables);
  protect_constants(image);
  if (g_verbose) fprintf(stderr, "machrun: %s at %p\n", real, image->base);
  each_section(image, run_initialisers);
  return image;
}
