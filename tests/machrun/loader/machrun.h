// A loader of Mach-O images (arm64, macOS) for an aarch64 Linux process.
//
// Only C crosses the border between the two: everything in C++ that the images
// need is itself Mach-O (cxxrt.dylib). Whatever cannot be loaded ends the
// process with one line and status 2.
#pragma once

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "macho.h"

enum { kImagesMax = 24, kSegmentsMax = 8, kDependentsMax = 16, kPage = 16384 };

typedef struct Image Image;

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
  bool weak_defines;
  Segment segments[kSegmentsMax];
  int segment_count;
  Library dependents[kDependentsMax];
  int dependent_count;
  Range fixups, exports, signature;
  const DyldInfoCommand* dyld_info;
  const SymtabCommand* symtab;
  Range eh_frame, unwind_info;  // offsets from `base`
  Range thread_template;
};

extern Image g_images[kImagesMax];
extern int g_image_count;
extern int g_verbose;        // MACHRUN_VERBOSE
extern uint32_t g_pretends;  // the version of macOS, 0xMMMMmmpp

// ---- failing ---------------------------------------------------------------

// Prints `machrun: PATH: TEXT` and ends the process with status 2.
_Noreturn void refuse(const Image* image, const char* format, ...)
    __attribute__((format(printf, 2, 3)));

// ---- image.c ---------------------------------------------------------------

// Loads a file and all it depends on, once; `quiet`: NULL where there is no
// file.
Image* load_image(const char* path, const Image* loader, bool quiet);
Image* image_of(const void* address);
// The part of the file; refuses what lies beyond its end.
const void* file_range(const Image* image, uint64_t offset, uint64_t size,
                       const char* what);
// Each section, for `visit`.
void each_section(Image* image, void (*visit)(Image*, const Section*));
uint8_t* at_address(const Image* image, uint64_t address);

// ---- signature.c -----------------------------------------------------------

// Refuses an image without an ad-hoc signature, or with a page that is not what
// was signed.
void check_signature(const Image* image);

// ---- fixups.c --------------------------------------------------------------

void apply_fixups(Image* image);
uint64_t read_uleb(const Image* image, const uint8_t** at, const uint8_t* end);

// ---- binding.c -------------------------------------------------------------

// The library of that install name; `loader` is whose run paths are searched.
Library find_library(const char* install_name, const Image* loader, bool weak);
// What the image itself exports, and whether that is a weak definition.
void* exported(const Image* image, const char* name, bool* weak);
void* in_library(const Library* library, const char* name);
// In all images, in the order of their loading, and in Python: flat lookup.
void* in_all(const char* name);
void* coalesced(const char* name);
// The address for an import of `image`; refuses one that its library lacks.
void* bind_symbol(const Image* image, int ordinal, const char* name, bool weak);

// ---- tls.c -----------------------------------------------------------------

void set_up_thread_variables(Image* image, const Section* section);
void tlv_thunk(void);
void tlv_atexit(void (*destroy)(void*), void* object);

// ---- system.c --------------------------------------------------------------

// What libSystem has: a shim, or what was reviewed and may pass through.
void* in_system(const char* name);
void* in_python(const char* name);
