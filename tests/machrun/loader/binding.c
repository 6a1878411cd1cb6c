// Which library has a symbol: two-level as on macOS, flat for Python's, and
// coalesced for weak definitions.
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "machrun.h"

// What stands for macOS's own libraries, and which of its names are theirs.
static const struct {
  const char *install_name, *file, *prefixes;
} kProvided[] = {
    {"/usr/lib/libc++.1.dylib", "cxxrt.dylib", NULL},
    {"/usr/lib/libobjc.A.dylib", "metalsim.dylib",
     "_objc_ _sel_ _class_ _method_ _object_ "},
    {"/System/Library/Frameworks/Metal.framework/Metal", "metalsim.dylib",
     "_MTL _NSDevice _NSProcessInfoPerformance _NSProcessPerformance "},
    {"/System/Library/Frameworks/Foundation.framework/Foundation",
     "metalsim.dylib", "_NS "},
    {"/System/Library/Frameworks/QuartzCore.framework/QuartzCore",
     "metalsim.dylib", "_CA "},
    {"/System/Library/Frameworks/Accelerate.framework/Accelerate",
     "accelerate.dylib", NULL},
};
static const char kSystem[] = "/usr/lib/libSystem.B.dylib";
// What macOS has in libSystem, and is here in images.
static const struct {
  const char *file, *prefixes;
} kOfSystem[] = {{"system.dylib", "__Unwind_ ___unw_ _unw_ _machrun_ "},
                 {"metalsim.dylib", "__Block_ __NSConcrete "}};

bool has_prefix(const char* name, const char* prefixes) {
  if (prefixes == NULL) return true;
  const char* at = prefixes;
  for (size_t size; *at != '\0'; at += size + 1) {
    size = strcspn(at, " ");
    if (!strncmp(name, at, size)) return true;
  }
  return false;
}

// Without `Versions/X/`, which is how a framework links to its newest version.
static void plain_name(const char* name, char plain[512]) {
  snprintf(plain, 512, "%s", name);
  char* version = strstr(plain, "/Versions/");
  char* rest = version ? strchr(version + 10, '/') : NULL;
  if (rest != NULL) memmove(version, rest, strlen(rest) + 1);
}

// Loads PATH, or DIRECTORY/NAME, in which @loader_path is the folder of
// `loader`; NULL where there is no such file, or another variable in it.
static Image* load_at(const char* path, const char* name, const Image* loader) {
  char file[2048];
  const char* slash = strrchr(loader->path, '/');
  if (!strncmp(path, "@loader_path/", 13))
    snprintf(file, sizeof file, "%.*s%s%s", (int)(slash - loader->path),
             loader->path, path + 12, name);
  else if (path[0] == '/')
    snprintf(file, sizeof file, "%s%s", path, name);
  else
    return NULL;
  return load_image(file, loader, true);
}

static Image* loaded_as(const char* install_name) {
  for (int i = 0; i < g_image_count; i++) {
    const char* own = g_images[i].install_name;
    if (own != NULL && !strcmp(own, install_name)) return &g_images[i];
  }
  return NULL;
}

static Image* find_image(const char* name, const Image* loader) {
  if (strncmp(name, "@rpath/", 7)) return load_at(name, "", loader);
  // As dyld does: the run paths of the loader and of what loaded that.
  Image* found = loaded_as(name);
  for (int i = g_image_count - 1; found == NULL && i >= 0; i--)
    for (int j = 0; found == NULL && j < g_images[i].run_path_count; j++)
      found = load_at(g_images[i].run_paths[j], name + 6, &g_images[i]);
  return found;
}

// What stands for a library of macOS lies next to the loader.
static Image* load_own(const char* file, const Image* loader) {
  char path[1024];
  ssize_t size = readlink("/proc/self/exe", path, sizeof path - 64);
  while (size > 0 && path[size - 1] != '/') size--;
  strcpy(path + (size > 0 ? size : 0), file);
  return load_image(path, loader, false);
}

Library find_library(const char* install_name, Image* loader, bool weak) {
  char plain[512];
  plain_name(install_name, plain);
  if (!strcmp(plain, kSystem)) return (Library){kSystem, NULL, NULL, true};
  for (size_t i = 0; i < sizeof kProvided / sizeof *kProvided; i++) {
    if (strcmp(plain, kProvided[i].install_name)) continue;
    Image* image = load_own(kProvided[i].file, loader);
    return (Library){kProvided[i].install_name, image, kProvided[i].prefixes,
                     false};
  }
  Image* image = find_image(install_name, loader);
  if (image == NULL && !weak)
    refuse(loader, "Library not loaded: %s", install_name);
  return (Library){install_name, image, NULL, false};
}

// ---- what an image exports -------------------------------------------------

// Walks the trie of <mach-o/loader.h>; the node where the name ends, or NULL.
static const uint8_t* trie_node(const Image* image, const uint8_t* start,
                                const uint8_t* end, const char* name) {
  const uint8_t* node = start;
  for (int depth = 0; depth < 4096 && node < end; depth++) {
    const uint8_t* at = node;
    uint64_t terminal = read_uleb(image, &at, end);
    if (*name == '\0') return terminal ? at : NULL;
    if (terminal >= (uint64_t)(end - at)) return NULL;
    at += terminal;
    int children = *at++;
    const uint8_t* next = NULL;
    while (children-- > 0 && at < end) {
      const char* edge = (const char*)at;
      size_t size = strnlen(edge, (size_t)(end - at));
      at += size + 1;
      uint64_t offset = read_uleb(image, &at, end);
      if (strncmp(name, edge, size) || offset >= (uint64_t)(end - start))
        continue;
      next = start + offset;
      name += size;
      break;
    }
    if (next == NULL) return NULL;
    node = next;
  }
  return NULL;
}

void* exported(const Image* image, const char* name, bool* weak) {
  const uint8_t* start = image->file + image->exports.offset;
  const uint8_t* end = start + image->exports.size;
  const uint8_t* at = trie_node(image, start, end, name);
  if (at == NULL) return NULL;
  uint64_t flags = read_uleb(image, &at, end);
  uint64_t known = EXPORT_SYMBOL_FLAGS_WEAK_DEFINITION |
                   EXPORT_SYMBOL_FLAGS_KIND_THREAD_LOCAL;
  if (flags & ~known)
    refuse(image, "its export %s is of an unknown kind (%#lx)", name, flags);
  if (weak != NULL) *weak = (flags & EXPORT_SYMBOL_FLAGS_WEAK_DEFINITION) != 0;
  uint64_t offset = read_uleb(image, &at, end);
  return at_address(image, image->preferred + offset, 1);
}

// ---- looking up ------------------------------------------------------------

void* in_all(const char* name) {
  for (int i = 0; i < g_image_count; i++) {
    void* found = exported(&g_images[i], name, NULL);
    if (found != NULL) return found;
  }
  return in_python(name);
}

void* coalesced(const char* name) {
  void* first = NULL;
  for (int i = 0; i < g_image_count; i++) {
    bool weak = false;
    void* found = exported(&g_images[i], name, &weak);
    if (found != NULL && !weak) return found;
    if (first == NULL) first = found;
  }
  return first;
}

void* in_library(const Library* library, const char* name) {
  if (library->is_system) {
    for (size_t i = 0; i < sizeof kOfSystem / sizeof *kOfSystem; i++)
      if (has_prefix(name, kOfSystem[i].prefixes))
        return exported(load_own(kOfSystem[i].file, NULL), name, NULL);
    return in_system(name);
  }
  if (library->image == NULL || !has_prefix(name, library->prefixes))
    return NULL;
  return exported(library->image, name, NULL);
}

void* bind_symbol(const Image* image, int ordinal, const char* name,
                  bool weak) {
  const Library* library = NULL;
  void* found = NULL;
  if (ordinal > 0 && ordinal <= image->dependent_count) {
    library = &image->dependents[ordinal - 1];
    found = in_library(library, name);
    if (found == NULL && library->is_system && !weak)
      refuse(image, "nobody has reviewed the import %s of libSystem", name);
  } else if (ordinal == BIND_SPECIAL_DYLIB_FLAT_LOOKUP) {
    found = in_all(name);
  } else if (ordinal == BIND_SPECIAL_DYLIB_MAIN_EXECUTABLE) {
    found = in_python(name);
  } else if (ordinal == BIND_SPECIAL_DYLIB_WEAK_LOOKUP) {
    found = coalesced(name);
  } else if (ordinal == BIND_SPECIAL_DYLIB_SELF) {
    found = exported(image, name, NULL);
  } else {
    refuse(image, "damaged: %s is of library %d", name, ordinal);
  }
  static const char* const kPlaces[] = {"this image", "the program",
                                        "flat namespace", "any image"};
  if (found == NULL && !weak)
    refuse(image, "Symbol not found: %s (expected in: %s)", name,
           library ? library->install_name : kPlaces[-ordinal]);
  return found;
}
