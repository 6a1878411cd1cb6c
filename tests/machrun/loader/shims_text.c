// Formats, locales (there is only "C"), classes of characters.
#define _GNU_SOURCE
#include <ctype.h>
#include <stdlib.h>
#include <string.h>

#include "shims.h"

// With `l` for the `L` of long double, which is a double on macOS. With `0x%lx`
// for a plain `%p`, which is "(nil)" for NULL on Linux, and "0x0" on macOS.
static const char* own_format(const char* format, char copy[1024]) {
  if (strchr(format, 'L') == NULL && strstr(format, "%p") == NULL)
    return format;
  if (strlen(format) >= 512) refuse(NULL, "a format of %zu", strlen(format));
  bool directive = false;
  char* to = copy;
  for (const char* at = format; *at; at++) {
    if (*at == '%' && at[1] == 'p' && !directive) {
      to = stpcpy(to, "0x%lx");
      at++;
      continue;
    }
    if (*at == '%') directive = !directive;
    if (*at == '[') directive = false;
    if (isalpha((unsigned char)*at) && !strchr("hlLjzt", *at))
      directive = false;
    *to++ = directive && *at == 'L' ? 'l' : *at;
  }
  *to = '\0';
  return copy;
}

// Calls a function of Linux that takes a va_list.
#define FORMATTED(function, ...)                                       \
  va_list list;                                                        \
  char copy[1024];                                                     \
  return function(__VA_ARGS__ __VA_OPT__(, ) own_format(format, copy), \
                  *linux_list(&list, stack))

int mac_vfprintf(FILE* out, const char* format, void* stack) {
  FORMATTED(vfprintf, out);
}
int mac_vsnprintf(char* to, size_t size, const char* format, void* stack) {
  FORMATTED(vsnprintf, to, size);
}
VARIADIC(int, printf, 1, const char* format) { FORMATTED(vprintf); }
VARIADIC(int, fprintf, 2, FILE* out, const char* format) {
  FORMATTED(vfprintf, out);
}
VARIADIC(int, snprintf, 3, char* to, size_t size, const char* format) {
  FORMATTED(vsnprintf, to, size);
}
VARIADIC(int, snprintf_l, 4, char* to, size_t size, void* locale,
         const char* format) {
  (void)locale;
  FORMATTED(vsnprintf, to, size);
}
VARIADIC(int, asprintf_l, 3, char** to, void* locale, const char* format) {
  (void)locale;
  FORMATTED(vasprintf, to);
}
VARIADIC(int, sscanf, 2, const char* text, const char* format) {
  if (strstr(format, "%p")) refuse(NULL, "sscanf with the format %s", format);
  FORMATTED(vsscanf, text);
}

// ---- locales ---------------------------------------------------------------

static bool is_c(const char* name) {
  return name[0] == '\0' || !strcmp(name, "C") || !strcmp(name, "POSIX");
}
// NULL as macOS does where it has no locale of that name.
void* mac_newlocale(int mask, const char* name, void* base) {
  (void)mask, (void)base;
  return is_c(name) ? (void*)"C" : NULL;
}
// Ten texts, and numbers of which "C" has none.
struct apple_lconv* mac_localeconv(void) {
  static struct apple_lconv c = {
      ".", "", "", "", "", "", "", "", "", "", .apple_int_frac_digits = 0};
  char *first = &c.apple_int_frac_digits, *last = &c.apple_int_n_sign_posn;
  memset(first, apple_CHAR_MAX, (size_t)(last + 1 - first));
  return &c;
}
const char* mac_setlocale(int category, const char* name) {
  (void)category;
  return name == NULL || is_c(name) ? "C" : NULL;
}

// ---- classes of characters -------------------------------------------------

apple__RuneLocale mac__DefaultRuneLocale;

__attribute__((constructor)) static void fill_runes(void) {
  static const struct {
    int (*is)(int);
    uint32_t type;
  } kClasses[] = {{isalpha, apple__CTYPE_A},  {iscntrl, apple__CTYPE_C},
                  {isdigit, apple__CTYPE_D},  {isgraph, apple__CTYPE_G},
                  {islower, apple__CTYPE_L},  {ispunct, apple__CTYPE_P},
                  {isspace, apple__CTYPE_S},  {isupper, apple__CTYPE_U},
                  {isxdigit, apple__CTYPE_X}, {isblank, apple__CTYPE_B},
                  {isprint, apple__CTYPE_R}};
  apple__RuneLocale* rune = &mac__DefaultRuneLocale;
  memcpy(rune->apple___magic, "RuneMagA", 8);
  for (int c = 0; c < 256; c++) {
    rune->apple___maplower[c] = c < 128 ? tolower(c) : c;
    rune->apple___mapupper[c] = c < 128 ? toupper(c) : c;
    for (size_t i = 0; c < 128 && i < COUNT(kClasses); i++)
      if (kClasses[i].is(c)) rune->apple___runetype[c] |= kClasses[i].type;
  }
}

int mac___maskrune(int c, unsigned long mask) {
  return c >= 0 && c < 128
             ? (int)(mac__DefaultRuneLocale.apple___runetype[c] & mask)
             : 0;
}
