// dyld: unwind tables, names of addresses, handles.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdlib.h>
#include <string.h>

#include "shims.h"

typedef struct {
  const void *header, *eh_frame;
  uint64_t eh_frame_size;
  const void* unwind_info;
  uint64_t unwind_info_size;
} UnwindSections;

bool mac__dyld_find_unwind_sections(const void* address, UnwindSections* to) {
  const Image* image = image_of(address);
  if (image == NULL) return false;
  *to = (UnwindSections){
      image->base, image->base + image->eh_frame.offset, image->eh_frame.size,
      image->base + image->unwind_info.offset, image->unwind_info.size};
  return true;
}

// Whatever is called with nothing to do, and says 0. __chkstk_darwin may change
// no register.
asm(".text\n.globl nothing\nnothing: mov x0, #0\n ret\n"
    ".globl mac___chkstk_darwin\nmac___chkstk_darwin: ret\n");

void mac__tlv_atexit(void (*end)(void*), void* object) {
  extern int __cxa_thread_atexit_impl(void (*)(void*), void*, void*);
  static int handle;
  __cxa_thread_atexit_impl(end, object, &handle);
}

// Async-signal-safe: reads what was mapped, and takes no lock.
int mac_dladdr(const void* address, Dl_info* to) {
  const Image* image = image_of(address);
  if (image == NULL) return dladdr(address, to);
  *to = (Dl_info){image->path, image->base, NULL, NULL};
  const struct symtab_command* table = image->symtab;
  if (table == NULL) return 1;
  const struct nlist_64* symbols = (const void*)(image->file + table->symoff);
  uint64_t slide = (uint64_t)image->base - image->preferred;
  uint64_t wanted = (uint64_t)address - slide, best = 0;
  for (uint32_t i = 0; i < table->nsyms; i++) {
    const struct nlist_64* symbol = &symbols[i];
    if (symbol->n_type & N_STAB || (symbol->n_type & N_TYPE) != N_SECT ||
        symbol->n_value > wanted || symbol->n_value <= best ||
        symbol->n_un.n_strx + 1ull >= table->strsize)
      continue;
    best = symbol->n_value;
    to->dli_sname =
        (const char*)image->file + table->stroff + symbol->n_un.n_strx + 1;
    to->dli_saddr = (void*)(best + slide);
  }
  return 1;
}

// A handle is a Library; nothing is ever unloaded.
static __thread char t_error[256];

// macOS's own libraries are no files, and always there.
static bool may_be_loaded(const char* path) {
  char* real = realpath(path, NULL);
  bool found = real == NULL;
  for (int i = 0; i < g_image_count && !found; i++)
    found = !strcmp(g_images[i].path, real);
  free(real);
  return found;
}

void* mac_dlopen(const char* path, int mode) {
  if (path == NULL) return apple_RTLD_DEFAULT;
  if (mode & apple_RTLD_NOLOAD && !may_be_loaded(path)) return NULL;
  Library found = find_library(path, &g_images[0], true);
  if (found.image == NULL && !found.is_system) {
    snprintf(t_error, sizeof t_error, "dlopen(%s): no such file", path);
    return NULL;
  }
  Library* handle = malloc(sizeof *handle);
  if (handle != NULL) *handle = found;
  return handle;
}
void* mac_dlsym(void* handle, const char* name) {
  static const Library kSystem = {"libSystem", NULL, NULL, true};
  char mangled[512];
  // RTLD_NEXT, RTLD_SELF and RTLD_MAIN_ONLY
  if (handle != apple_RTLD_DEFAULT && (intptr_t)handle < 0)
    refuse(NULL, "dlsym with the handle %ld", (long)handle);
  snprintf(mangled, sizeof mangled, "_%s", name);
  void* found = handle == apple_RTLD_DEFAULT ? in_all(mangled)
                                             : in_library(handle, mangled);
  if (found == NULL && handle == apple_RTLD_DEFAULT)
    found = in_library(&kSystem, mangled);
  if (found == NULL)
    snprintf(t_error, sizeof t_error, "dlsym(%p, %s): symbol not found", handle,
             name);
  return found;
}
char* mac_dlerror(void) {
  static __thread char told[sizeof t_error];
  if (t_error[0] == '\0') return NULL;
  strcpy(told, t_error);
  t_error[0] = '\0';
  return told;
}
int mac_dlclose(void* handle) {
  if (handle != apple_RTLD_DEFAULT) free(handle);
  return 0;
}
