// A loader of Mach-O images (arm64, macOS) for an aarch64 Linux process.
//
// Only C crosses the border between the two: everything in C++ that the images
// need is itself Mach-O (cxxrt.dylib). Whatever cannot be loaded ends the
// process with one line and status 2. The files are read by Apple's own
// headers, which ziglang has.
#pragma once

#include <mach-o/fixup-chains.h>
#include <mach-o/loader.h>
#include <mach-o/nlist.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum { kImagesMax = 24, kSegmentsMax = 8, kDependentsMax = 16, kPage = 16384 };

typedef struct mach_header_64 MachHeader;
typedef struct load_command LoadCommand;
typedef struct segment_command_64 SegmentCommand;
typedef struct section_64 Section;
typedef struct Image Image;

typedef struct {
  uint32_t offset, size;
} Range;

// A library by its install name, and which part of what it is made of has it.
typedef struct {
  const char* install_name;
  Image* image;          // NULL: libSystem, or a weak one that is not there
  const char* prefixes;  // of the names that it has; NULL: all
  bool is_system;
} Library;

typedef struct {
  uint8_t* start;
  uint64_t size;
  const SegmentCommand* command;
} Segment;

struct Image {
  char path[512];
  const char* install_name;
  int number;
  const uint8_t* file;  // the whole file, read only
  uint64_t file_size;
  uint8_t* base;       // where its lowest address lies; segments are inside
  uint64_t preferred;  // that address in the file
  uint64_t size;
  Segment segments[kSegmentsMax];
  int segment_count;
  Library dependents[kDependentsMax];
  int dependent_count;
  const char* run_paths[kDependentsMax];
  int run_path_count;
  bool is_for_macos;
  Range fixups, exports, signature;  // in the file, all of it there
  const struct dyld_info_command* dyld_info;
  const struct symtab_command* symtab;
  Range eh_frame, unwind_info, thread_template;  // from `base`
};

extern Image g_images[kImagesMax];
extern int g_image_count;
extern uint32_t g_pretends;  // the version of macOS, 0xMMMMmmpp

// ---- image.c ---------------------------------------------------------------

// Prints `machrun: PATH: TEXT` and ends the process with status 2.
_Noreturn void refuse(const Image* image, const char* format, ...)
    __attribute__((format(printf, 2, 3)));
// Loads a file and all it depends on, once; `quiet`: NULL where there is no
// file.
Image* load_image(const char* path, const Image* loader, bool quiet);
Image* image_of(const void* address);
// Whether it lies in a section of code.
bool is_code(const Image* image, const void* address);
// The part of the file; refuses what lies beyond its end.
const void* file_range(const Image* image, uint64_t offset, uint64_t size,
                       const char* what);
// The `size` bytes at an address of the file, where they are mapped.
uint8_t* at_address(const Image* image, uint64_t address, uint64_t size);
// The text that a load command has at an offset.
const char* command_text(const Image* image, const LoadCommand* command,
                         uint32_t offset);
void each_command(Image* image, void (*visit)(Image*, const LoadCommand*));

// ---- signature.c -----------------------------------------------------------

// Refuses an image without an ad-hoc signature, or with a page that is not what
// was signed.
void check_signature(const Image* image);

// ---- fixups.c --------------------------------------------------------------

void apply_fixups(Image* image);
uint64_t read_uleb(const Image* image, const uint8_t** at, const uint8_t* end);

// ---- binding.c -------------------------------------------------------------

// Whether a name begins with one of `prefixes`, each followed by a space.
bool has_prefix(const char* name, const char* prefixes);
// The library of that install name; `loader` is whose run paths are searched.
Library find_library(const char* install_name, Image* loader, bool weak);
// What the image itself exports, and whether that is a weak definition.
void* exported(const Image* image, const char* name, bool* weak);
void* in_library(const Library* library, const char* name);
// In all images, in the order of their loading, and in Python: flat lookup.
void* in_all(const char* name);
// The strong definition in any image, else the first weak one.
void* coalesced(const char* name);
// The address for an import of `image`; refuses one that its library lacks.
void* bind_symbol(const Image* image, int ordinal, const char* name, bool weak);

// ---- tls.c -----------------------------------------------------------------

void set_up_thread_variables(Image* image, const Section* section);

// ---- system.c --------------------------------------------------------------

// What libSystem has: a shim, or what was reviewed and may pass through.
void* in_system(const char* name);
void* in_python(const char* name);
// Lists them, each kind with its names.
int print_imports(void);
