// The parts of a Mach-O file that the loader reads, by Apple's <mach-o/*.h>;
// abi_check.c holds them against those headers.
#pragma once

#include <stdint.h>

typedef struct {
  uint32_t magic, cputype, cpusubtype, filetype, ncmds, sizeofcmds, flags, zero;
} MachHeader;

typedef struct {
  uint32_t cmd, cmdsize;
} LoadCommand;

typedef struct {
  uint32_t cmd, cmdsize;
  char segname[16];
  uint64_t vmaddr, vmsize, fileoff, filesize;
  uint32_t maxprot, initprot, nsects, flags;
} SegmentCommand;

typedef struct {
  char sectname[16], segname[16];
  uint64_t addr, size;
  uint32_t offset, align, reloff, nreloc, flags, reserved[3];
} Section;

typedef struct {
  uint32_t cmd, cmdsize, symoff, nsyms, stroff, strsize;
} SymtabCommand;

typedef struct {
  uint32_t cmd, cmdsize, name, timestamp, version, compatibility;
} DylibCommand;

typedef struct {
  uint32_t cmd, cmdsize, path;
} RpathCommand;

typedef struct {
  uint32_t cmd, cmdsize, platform, minos, sdk, ntools;
} BuildVersionCommand;

typedef struct {
  uint32_t cmd, cmdsize, dataoff, datasize;
} LinkeditCommand;

typedef struct {
  uint32_t offset, size;
} Range;

typedef struct {
  uint32_t cmd, cmdsize;
  Range rebase, bind, weak_bind, lazy_bind, exported;
} DyldInfoCommand;

typedef struct {
  uint32_t name;
  uint8_t type, section;
  uint16_t desc;
  uint64_t value;
} Nlist;

typedef struct {
  uint32_t version, starts_offset, imports_offset, symbols_offset;
  uint32_t imports_count, imports_format, symbols_format;
} ChainedFixups;

typedef struct {
  uint32_t size;
  uint16_t page_size, pointer_format;
  uint64_t segment_offset;
  uint32_t max_valid_pointer;
  uint16_t page_count, page_start[];
} __attribute__((packed)) ChainedStarts;

enum {
  kMagic64 = 0xfeedfacf,
  kFatMagic = 0xbebafeca,
  kCpuArm64 = 0x0100000c,
  kCpuX86_64 = 0x01000007,
  kDylib = 6,
  kBundle = 8,
  kWeakDefines = 0x8000,
  kPlatformMacos = 1,
  kReadOnlyAfterFixups = 0x10,  // SG_READ_ONLY
};

enum {
  kLcReqDyld = 0x80000000,
  kLcSymtab = 0x2,
  kLcDysymtab = 0xb,
  kLcLoadDylib = 0xc,
  kLcIdDylib = 0xd,
  kLcLoadWeakDylib = 0x80000018,
  kLcSegment64 = 0x19,
  kLcRpath = 0x8000001c,
  kLcCodeSignature = 0x1d,
  kLcReexportDylib = 0x8000001f,
  kLcDyldInfo = 0x22,
  kLcDyldInfoOnly = 0x80000022,
  kLcBuildVersion = 0x32,
  kLcExportsTrie = 0x80000033,
  kLcChainedFixups = 0x80000034,
};

// Kinds of sections (the low byte of their flags).
enum {
  kModInitFuncs = 0x09,
  kThreadLocalRegular = 0x11,
  kThreadLocalZerofill = 0x12,
  kThreadLocalVariables = 0x13,
  kInitOffsets = 0x16,
};
