/* Intel AMX in C, for tests on other processors: a processor without the instructions answers each
 * with SIGILL, whose handler does what it says and goes on behind it (encodings and operations: Intel
 * SDM, volume 2). What would fault in hardware is an error, as is touching guarded memory; errors are
 * counted and the first is described, because an abort would hide it. A thread's tiles are its own. */
#define _GNU_SOURCE /* names of registers */
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <ucontext.h>

enum { TILES = 8, ROWS = 16, BYTES = 64 };

typedef struct {
  int rows, bytes;
  union {
    uint8_t u8[ROWS][BYTES];
    uint16_t bf16[ROWS][BYTES / 2];
    int8_t i8[ROWS][BYTES];
    int32_t i32[ROWS][BYTES / 4];
    float f32[ROWS][BYTES / 4];
  };
} Tile;

static _Thread_local Tile tiles[TILES];
static _Thread_local bool configured;

static atomic_int errors, products, active; /* active: threads with a configuration */
static char first_error[256];

static void fail(const char *format, ...) {
  if (atomic_fetch_add(&errors, 1) > 0) return;
  va_list args;
  va_start(args, format);
  vsnprintf(first_error, sizeof first_error, format, args);
  va_end(args);
}

const char *amx_error(void) { return first_error; }
void amx_forget(void) {
  atomic_store(&errors, 0);
  first_error[0] = 0;
}
int amx_products(void) { return products; }
int amx_active(void) { return active; }

/* Memory that no tile may be loaded from or stored to, set before kernels run. */
enum { MAX_FORBIDDEN = 64 };
static struct { const uint8_t *begin, *end; } forbidden[MAX_FORBIDDEN];
static int num_forbidden;

void amx_forbid(const uint8_t *begin, int64_t bytes) {
  if (num_forbidden == MAX_FORBIDDEN) {
    fail("more than %d guards", MAX_FORBIDDEN);
    return;
  }
  forbidden[num_forbidden].begin = begin;
  forbidden[num_forbidden++].end = begin + bytes;
}
void amx_allow_all(void) { num_forbidden = 0; }

static bool allowed(const uint8_t *address, int bytes, const char *what) {
  for (int i = 0; i < num_forbidden; ++i) {
    if (address < forbidden[i].end && address + bytes > forbidden[i].begin) {
      fail("%s: %d bytes, %td from the begin of guard %d", what, bytes,
           address - forbidden[i].begin, i);
      return false;
    }
  }
  return true;
}

static Tile *checked(int number, const char *what) {
  static _Thread_local Tile none;
  if (number >= TILES) {
    fail("%s: tile %d", what, number);
  } else if (!configured || tiles[number].rows == 0 || tiles[number].bytes == 0) {
    fail("%s: tile %d is not configured", what, number);
  } else {
    return &tiles[number];
  }
  none.rows = none.bytes = 0;
  return &none;
}

static void tilerelease(void) {
  if (configured) atomic_fetch_sub(&active, 1);
  memset(tiles, 0, sizeof tiles);
  configured = false;
}

static void ldtilecfg(const uint8_t *line) {
  tilerelease();
  if (line[0] != 1) fail("ldtilecfg: palette %d", line[0]);
  for (int i = 1; i < 64; ++i) {
    bool used = (i >= 16 && i < 16 + 2 * TILES) || (i >= 48 && i < 48 + TILES);
    if (!used && line[i] != 0) fail("ldtilecfg: byte %d is %d", i, line[i]);
  }
  for (int i = 0; i < TILES; ++i) {
    uint16_t bytes;
    memcpy(&bytes, line + 16 + 2 * i, 2);
    int rows = line[48 + i];
    if (rows > ROWS || bytes > BYTES || (rows == 0) != (bytes == 0)) {
      fail("ldtilecfg: tile %d of %d rows of %d bytes", i, rows, bytes);
      continue;
    }
    tiles[i].rows = rows;
    tiles[i].bytes = bytes;
  }
  configured = true;
  atomic_fetch_add(&active, 1);
}

static void tilezero(int tile) {
  Tile *t = checked(tile, "tilezero");
  memset(t->u8, 0, sizeof t->u8);
}

static void tileloadd(int tile, const uint8_t *address, int64_t stride) {
  Tile *t = checked(tile, "tileloadd");
  memset(t->u8, 0, sizeof t->u8);
  for (int r = 0; r < t->rows; ++r) {
    const uint8_t *row = address + r * stride;
    if (allowed(row, t->bytes, "tileloadd")) memcpy(t->u8[r], row, t->bytes);
  }
}

static void tilestored(int tile, uint8_t *address, int64_t stride) {
  Tile *t = checked(tile, "tilestored");
  for (int r = 0; r < t->rows; ++r) {
    uint8_t *row = address + r * stride;
    if (allowed(row, t->bytes, "tilestored")) memcpy(row, t->u8[r], t->bytes);
  }
}

/* sums [rows, bytes / 4] of a [rows, depth bytes] and b [depth / 4, bytes]. */
static bool fits(int sums, int a, int b, const char *what, Tile **s, Tile **x, Tile **y) {
  *s = checked(sums, what), *x = checked(a, what), *y = checked(b, what);
  atomic_fetch_add(&products, 1);
  if (sums == a || sums == b || a == b) {
    fail("%s: tiles %d, %d, %d", what, sums, a, b);
  } else if ((*s)->bytes % 4 || (*x)->bytes % 4 || (*s)->bytes != (*y)->bytes ||
             (*s)->rows != (*x)->rows || (*x)->bytes != 4 * (*y)->rows) {
    fail("%s: [%d, %d] of [%d, %d] and [%d, %d]", what, (*s)->rows, (*s)->bytes, (*x)->rows,
         (*x)->bytes, (*y)->rows, (*y)->bytes);
  } else {
    return true;
  }
  return false;
}

static float widen(uint16_t bits) {
  uint32_t word = (uint32_t)bits << 16;
  float value;
  if ((word & 0x7f800000) == 0) word &= 0x80000000; /* denormals are zero */
  memcpy(&value, &word, 4);
  return value;
}

/* Even and odd products are added up apart, and to the sums at the end. */
static void tdpbf16ps(int sums, int a, int b) {
  Tile *s, *x, *y;
  if (!fits(sums, a, b, "tdpbf16ps", &s, &x, &y)) return;
  for (int m = 0; m < s->rows; ++m) {
    for (int n = 0; n < s->bytes / 4; ++n) {
      float half[2] = {0, 0};
      for (int k = 0; k < x->bytes / 2; ++k) {
        half[k % 2] += widen(x->bf16[m][k]) * widen(y->bf16[k / 2][2 * n + k % 2]);
      }
      s->f32[m][n] += half[0] + half[1];
    }
  }
}

/* Signed bytes of a, and signed or unsigned ones of b. */
static void multiply_bytes(int sums, int a, int b, bool is_signed, const char *what) {
  Tile *s, *x, *y;
  if (!fits(sums, a, b, what, &s, &x, &y)) return;
  for (int m = 0; m < s->rows; ++m) {
    for (int n = 0; n < s->bytes / 4; ++n) {
      int32_t total = 0;
      for (int k = 0; k < x->bytes; ++k) {
        int row = k / 4, column = 4 * n + k % 4;
        total += x->i8[m][k] * (is_signed ? y->i8[row][column] : y->u8[row][column]);
      }
      s->i32[m][n] += total;
    }
  }
}

/* How the kernel's signal frame holds the registers, by their numbers in instructions. */
static const int registers[16] = {REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP,
                                  REG_RSI, REG_RDI, REG_R8,  REG_R9,  REG_R10, REG_R11,
                                  REG_R12, REG_R13, REG_R14, REG_R15};

typedef struct {
  int reg, rm, vvvv, length; /* the length of the whole instruction */
  bool memory;
  uint8_t *address; /* base and displacement */
  int64_t stride;   /* index, scaled */
} Operands;

/* Operands behind a prefix of three bytes and the opcode. */
static Operands decode(const uint8_t *code, const greg_t *values) {
  int r = ~code[1] >> 7 & 1, x = ~code[1] >> 6 & 1, b = ~code[1] >> 5 & 1;
  int mod = code[4] >> 6, rm = code[4] & 7;
  Operands o = {.reg = (code[4] >> 3 & 7) | r << 3, .rm = rm | b << 3, .length = 5};
  o.vvvv = ~(code[2] >> 3) & 15;
  o.memory = mod != 3;
  if (!o.memory) return o;
  int64_t address = 0;
  int bytes = mod == 1 ? 1 : mod == 2 ? 4 : 0; /* of the displacement */
  if (rm == 4) {
    int sib = code[o.length++], index = (sib >> 3 & 7) | x << 3;
    if (index != 4) o.stride = (int64_t)values[registers[index]] << (sib >> 6);
    if (mod == 0 && (sib & 7) == 5) {
      bytes = 4;
    } else {
      address = values[registers[(sib & 7) | b << 3]];
    }
  } else if (mod == 0 && rm == 5) { /* relative to the next instruction */
    bytes = 4;
    address = (int64_t)code + o.length + 4;
  } else {
    address = values[registers[o.rm]];
  }
  int32_t displacement = (int8_t)code[o.length];
  if (bytes == 4) memcpy(&displacement, code + o.length, 4);
  o.address = (uint8_t *)(address + (bytes ? displacement : 0));
  o.length += bytes;
  return o;
}

/* The length of the instruction at `code`, after doing what it says; 0 for a foreign one. */
static int emulate(const uint8_t *code, const greg_t *values) {
  enum { NONE, P66, F3, F2 };
  if (code[0] != 0xc4 || (code[1] & 31) != 2 || (code[2] & 0x84) != 0) return 0;
  int prefix = code[2] & 3, opcode = code[3];
  Operands o = decode(code, values);
  if (opcode == 0x49 && prefix == NONE && o.memory) {
    ldtilecfg(o.address);
  } else if (opcode == 0x49 && prefix == NONE && code[4] == 0xc0) {
    tilerelease();
  } else if (opcode == 0x49 && prefix == F2 && !o.memory) {
    tilezero(o.reg);
  } else if (opcode == 0x4b && (prefix == F2 || prefix == P66) && o.memory) { /* P66: a hint */
    tileloadd(o.reg, o.address, o.stride);
  } else if (opcode == 0x4b && prefix == F3 && o.memory) {
    tilestored(o.reg, o.address, o.stride);
  } else if (opcode == 0x5c && prefix == F3 && !o.memory) {
    tdpbf16ps(o.reg, o.rm, o.vvvv);
  } else if (opcode == 0x5e && prefix == F2 && !o.memory) {
    multiply_bytes(o.reg, o.rm, o.vvvv, true, "tdpbssd");
  } else if (opcode == 0x5e && prefix == F3 && !o.memory) {
    multiply_bytes(o.reg, o.rm, o.vvvv, false, "tdpbsud");
  } else {
    return 0;
  }
  return o.length;
}

static struct sigaction before;

static void illegal_instruction(int number, siginfo_t *info, void *context) {
  (void)number;
  (void)info;
  greg_t *values = ((ucontext_t *)context)->uc_mcontext.gregs;
  int length = emulate((const uint8_t *)values[REG_RIP], values);
  if (length == 0) sigaction(SIGILL, &before, NULL); /* which the instruction then raises again */
  values[REG_RIP] += length;
}

void amx_begin(void) {
  struct sigaction action = {.sa_sigaction = illegal_instruction, .sa_flags = SA_SIGINFO};
  sigaction(SIGILL, &action, &before);
}

void amx_end(void) { sigaction(SIGILL, &before, NULL); }
