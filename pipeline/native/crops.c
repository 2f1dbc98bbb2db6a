/* Every view of a stored picture from one decode of the region that the views need, a batch at a time.
 *
 *   file --(pread: a file cut short under us is an error, where a memory map would kill the process)--> JPEG or pixels
 *        --(libjpeg-turbo, or a copy: only the rows and columns under the boxes)--> RGBX rows
 *        --(per view: vertical, then horizontal triangle filter, flip)--> (side, side, 3) uint8
 *
 * The filter is Pillow's antialiased bilinear on the crop: a triangle as wide as the reduction, cut off at the box.
 * The arithmetic on pixels is integer and the same in the plain and the AVX2 version: a product is (a * b + 2^14) >> 15,
 * pixels have 7 fractional bits, weights 15. A product is off by 2^-8 of a grey level at most, before the one rounding at
 * the end.
 *
 * The accurate inverse DCT and the smooth chroma upsampling cost three percent and are worth ten decibels.
 */
#include <errno.h>
#include <limits.h>
#include <math.h>
#include <pthread.h>
#include <setjmp.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <jpeglib.h>

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#define HAVE_AVX2 1
#endif

enum { DONE = 0, DAMAGED = 1, OTHER_PICTURE = 2, NO_MEMORY = 3, UNREADABLE = 4, CHANGED = 5 };
enum { IDLE = 0, READING = 1, DECODING = 2, CUTTING = 3 }; /* what a thread is at, for a watchdog */
enum { PIXEL = 4, ROWS = 4, MARGIN = 2, MOST_VIEWS = 16 }; /* ROWS output rows are made together */
enum { FILTER_BITS = 9, FILTERS = 1 << FILTER_BITS };      /* that a thread keeps: of a few kilobytes each */

typedef struct {
    int32_t top, left, high, wide, flip; /* a view's box in the stored picture, and whether it is mirrored */
} box_t;

/* One picture: where it lies, what the store says of it, and how it went. */
typedef struct {
    uint8_t *data;         /* its bytes in memory, where file is -1; else where to read them to, if anywhere */
    uint64_t offset, size; /* in the file */
    uint64_t sum;          /* of the bytes, see checksum(); 0: not known */
    int32_t file;
    uint16_t height, width;
    int32_t raw; /* the bytes are RGB pixels, row by row, and no JPEG */
    int32_t status;
} sample_t;

/* The filter of one axis: output i is the sum of taps[i * reach + k] * input[first[i] + k], k < reach. */
typedef struct {
    int length, side; /* what it was made for */
    int reach;        /* taps of each output; some may be 0, none lies outside of the input */
    int32_t *first;
    int16_t *taps;
    size_t side_cap, tap_cap;
} filter_t;

typedef void vertical_fn(const uint8_t *const *, size_t, const int16_t *const *, int, int, int16_t *);
typedef void horizontal_fn(const int16_t *, const filter_t *, int, uint8_t *const *);

typedef struct {
    struct jpeg_decompress_struct jpeg;
    struct jpeg_error_mgr handler;
    jmp_buf escape;
    uint8_t *bytes; /* a picture as read from its file */
    size_t bytes_cap;
    uint8_t *pixels; /* the region, RGBX */
    size_t pixels_cap;
    int16_t *line; /* four output rows before the horizontal filter, pixel by pixel: RGBX of each row */
    size_t line_cap;
    filter_t filters[FILTERS];
    vertical_fn *vertical;
    horizontal_fn *horizontal;
    atomic_int stage, place; /* what the thread is at, and at which picture of the batch */
} scratch_t;

/* ------------------------------------------------------------------------------------------------ memory */

static int grow(void **memory, size_t *cap, size_t bytes) {
    if (*cap >= bytes) return 1;
    free(*memory);
    *cap = 0;
    *memory = aligned_alloc(64, (bytes + 63) / 64 * 64);
    if (*memory) *cap = bytes;
    return *memory != NULL;
}

static void release(scratch_t *s) {
    jpeg_destroy_decompress(&s->jpeg);
    free(s->bytes), free(s->pixels), free(s->line);
    for (filter_t *f = s->filters; f < s->filters + FILTERS; f++) free(f->first), free(f->taps);
}

/* ------------------------------------------------------------------------------------------------ filters */

/* Pillow's triangle: as wide as the reduction, cut off at the edges, in 15-bit fixed point with an exact sum. */
static int make_filter(filter_t *f, int length, int side) {
    if (f->length == length && f->side == side) return 1;
    double scale = (double)length / side, support = scale < 1 ? 1 : scale, slope = 1 / support;
    int reach = (int)ceil(2 * support); /* so many pixel centres lie under a triangle at most */
    if (reach > length) reach = length;
    f->length = f->side = 0;
    float *weight = malloc(reach * sizeof(float));
    if (!weight || !grow((void **)&f->first, &f->side_cap, side * sizeof(int32_t)) ||
        !grow((void **)&f->taps, &f->tap_cap, (size_t)side * reach * sizeof(int16_t))) {
        free(weight);
        return 0;
    }
    for (int i = 0; i < side; i++) {
        double centre = (i + 0.5) * scale - 0.5; /* on the axis where pixel k lies at k */
        int first = (int)floor(centre - support) + 1, best = 0, most = 0, total = 0;
        if (first > length - reach) first = length - reach;
        if (first < 0) first = 0;
        float sum = 0;
        for (int k = 0; k < reach; k++) {
            float w = (float)(1 - fabs(first + k - centre) * slope);
            weight[k] = w > 0 ? w : 0;
            sum += weight[k];
            if (weight[k] > weight[best]) best = k;
        }
        int16_t *tap = f->taps + (size_t)i * reach;
        float unit = 32768 / sum;
        for (int k = 0; k < reach; k++) {
            int fixed = (int)(weight[k] * unit + 0.5f);
            total += fixed;
            if (k == best) most = fixed;
            else tap[k] = (int16_t)fixed;
        }
        int exact = most + 32768 - total;
        tap[best] = (int16_t)(exact > 32767 ? 32767 : exact); /* 1 is not to be had: 255 stays 255 */
        f->first[i] = first;
    }
    free(weight);
    f->length = length, f->side = side, f->reach = reach;
    return 1;
}

/* The filter for one axis, kept from an earlier picture where possible; never the slot `taken`, which the other axis is
 * using. */
static filter_t *find_filter(scratch_t *s, int length, int side, const filter_t *taken) {
    uint32_t place = ((uint32_t)length * 0x9E3779B1u + (uint32_t)side * 0x85EBCA6Bu) >> (32 - FILTER_BITS);
    if (s->filters + place == taken && taken->length != length) place ^= 1;
    return make_filter(s->filters + place, length, side) ? s->filters + place : NULL;
}

static inline int16_t product(int16_t a, int16_t b) { return (int16_t)((a * b + 16384) >> 15); }

/* Hundreds of products, each rounded up, could pass 255: the sum stops there. */
static inline int16_t sum_of(int16_t a, int16_t b) { return (int16_t)(a + b > INT16_MAX ? INT16_MAX : a + b); }

/* Four output rows of all columns into the line: rows[r] points at the row of the first tap. */
static void vertical_plain(const uint8_t *const *rows, size_t stride, const int16_t *const *taps, int reach, int pixels,
                           int16_t *line) {
    for (int x = 0; x < pixels; x++)
        for (int r = 0; r < ROWS; r++)
            for (int c = 0; c < PIXEL; c++) {
                int16_t sum = 0;
                for (int k = 0; k < reach; k++)
                    sum = sum_of(sum, product((int16_t)(rows[r][k * stride + x * PIXEL + c] << 7), taps[r][k]));
                *line++ = sum;
            }
}

/* The line as four rows of RGB bytes, mirrored where asked. */
static void horizontal_plain(const int16_t *line, const filter_t *f, int flip, uint8_t *const *outs) {
    for (int i = 0; i < f->side; i++) {
        int from = flip ? f->side - 1 - i : i;
        const int16_t *pixel = line + (size_t)f->first[from] * ROWS * PIXEL, *tap = f->taps + (size_t)from * f->reach;
        for (int r = 0; r < ROWS; r++)
            for (int c = 0; c < 3; c++) {
                int16_t sum = 64;
                for (int k = 0; k < f->reach; k++)
                    sum = sum_of(sum, product(pixel[(k * ROWS + r) * PIXEL + c], tap[k]));
                outs[r][i * 3 + c] = (uint8_t)(sum >> 7);
            }
    }
}

#ifdef HAVE_AVX2
#define AVX2 __attribute__((target("avx2")))
#define INLINE static inline __attribute__((always_inline, target("avx2")))

/* Four pixels of four rows at a time. `reach` is a constant where it is small: then no loop is left. `line` overlaps
 * nothing that is read: then taps are fetched once and not for each pixel. */
INLINE void vertical_by(const uint8_t *const *rows, size_t stride, const int16_t *const *taps, const int reach,
                        int pixels, int16_t *restrict line) {
    for (int x = 0; x < pixels; x += 4, line += 4 * ROWS * PIXEL) {
        __m256i row[ROWS];
        for (int r = 0; r < ROWS; r++) {
            const uint8_t *from = rows[r] + x * PIXEL;
            row[r] = _mm256_setzero_si256();
            for (int k = 0; k < reach; k++, from += stride) {
                __m256i pixel = _mm256_slli_epi16(_mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i *)from)), 7);
                row[r] = _mm256_adds_epi16(row[r], _mm256_mulhrs_epi16(pixel, _mm256_set1_epi16(taps[r][k])));
            }
        }
        /* From pixels of a row to rows of a pixel. */
        __m256i even_up = _mm256_unpacklo_epi64(row[0], row[1]), odd_up = _mm256_unpackhi_epi64(row[0], row[1]);
        __m256i even_low = _mm256_unpacklo_epi64(row[2], row[3]), odd_low = _mm256_unpackhi_epi64(row[2], row[3]);
        __m256i *to = (__m256i *)line;
        _mm256_store_si256(to, _mm256_permute2x128_si256(even_up, even_low, 0x20));
        _mm256_store_si256(to + 1, _mm256_permute2x128_si256(odd_up, odd_low, 0x20));
        _mm256_store_si256(to + 2, _mm256_permute2x128_si256(even_up, even_low, 0x31));
        _mm256_store_si256(to + 3, _mm256_permute2x128_si256(odd_up, odd_low, 0x31));
    }
}

AVX2 static void vertical_avx2(const uint8_t *const *rows, size_t stride, const int16_t *const *taps, int reach,
                               int pixels, int16_t *line) {
    switch (reach) {
        case 2: vertical_by(rows, stride, taps, 2, pixels, line); break;
        case 3: vertical_by(rows, stride, taps, 3, pixels, line); break;
        case 4: vertical_by(rows, stride, taps, 4, pixels, line); break;
        case 5: vertical_by(rows, stride, taps, 5, pixels, line); break;
        case 6: vertical_by(rows, stride, taps, 6, pixels, line); break;
        case 7: vertical_by(rows, stride, taps, 7, pixels, line); break;
        case 8: vertical_by(rows, stride, taps, 8, pixels, line); break;
        default: vertical_by(rows, stride, taps, reach, pixels, line);
    }
}

/* Four output pixels of four rows at a time. */
INLINE void horizontal_by(const int16_t *line, const filter_t *f, const int reach, int flip, uint8_t *const *outs) {
    const __m256i to_rgb = _mm256_setr_epi8(0, 1, 2, 4, 5, 6, 8, 9, 10, 12, 13, 14, -1, -1, -1, -1,
                                            0, 1, 2, 4, 5, 6, 8, 9, 10, 12, 13, 14, -1, -1, -1, -1);
    /* Copies: for all that a compiler knows the bytes that are written could be those of the filter. */
    const int side = f->side;
    const int32_t *first = f->first;
    const int16_t *taps = f->taps;
    uint8_t *to[ROWS];
    memcpy(to, outs, sizeof to);
    for (int done = 0; done < side; done += 4) {
        __m256i sum[4];
        for (int j = 0; j < 4; j++) {
            int i = done + j < side ? done + j : side - 1;
            if (flip) i = side - 1 - i;
            const __m256i *pixel = (const __m256i *)line + first[i];
            const int16_t *tap = taps + (size_t)i * reach;
            sum[j] = _mm256_set1_epi16(64);
            for (int k = 0; k < reach; k++)
                sum[j] = _mm256_adds_epi16(sum[j], _mm256_mulhrs_epi16(pixel[k], _mm256_set1_epi16(tap[k])));
            sum[j] = _mm256_srai_epi16(sum[j], 7);
        }
        __m256 two = _mm256_castsi256_ps(_mm256_packus_epi16(sum[0], sum[1]));
        __m256 more = _mm256_castsi256_ps(_mm256_packus_epi16(sum[2], sum[3]));
        __m256i even = _mm256_shuffle_epi8(_mm256_castps_si256(_mm256_shuffle_ps(two, more, 0x88)), to_rgb);
        __m256i odd = _mm256_shuffle_epi8(_mm256_castps_si256(_mm256_shuffle_ps(two, more, 0xDD)), to_rgb);
        const __m128i row[ROWS] = {_mm256_castsi256_si128(even), _mm256_castsi256_si128(odd),
                                   _mm256_extracti128_si256(even, 1), _mm256_extracti128_si256(odd, 1)};
        for (int r = 0; r < ROWS; r++) {
            uint8_t *out = to[r] + (size_t)done * 3;
            if (done + 6 <= side) { /* the last four bytes are written again */
                _mm_storeu_si128((__m128i *)out, row[r]);
            } else {
                uint8_t bytes[16];
                _mm_storeu_si128((__m128i *)bytes, row[r]);
                memcpy(out, bytes, 3 * (side - done < 4 ? side - done : 4));
            }
        }
    }
}

AVX2 static void horizontal_avx2(const int16_t *line, const filter_t *f, int flip, uint8_t *const *outs) {
    switch (f->reach) {
        case 2: horizontal_by(line, f, 2, flip, outs); break;
        case 3: horizontal_by(line, f, 3, flip, outs); break;
        case 4: horizontal_by(line, f, 4, flip, outs); break;
        case 5: horizontal_by(line, f, 5, flip, outs); break;
        case 6: horizontal_by(line, f, 6, flip, outs); break;
        case 7: horizontal_by(line, f, 7, flip, outs); break;
        case 8: horizontal_by(line, f, 8, flip, outs); break;
        default: horizontal_by(line, f, f->reach, flip, outs);
    }
}
#endif

/* One view from a region of RGBX rows whose first pixel is (top, left) of the picture. */
static int make_view(scratch_t *s, const uint8_t *region, size_t stride, int top, int left, const box_t *box, int side,
                     uint8_t *out) {
    /* Behind the line: up to three pixels that are written and not read, and a row of output that nobody wants. */
    size_t line = ((size_t)box->wide + 4) * ROWS * PIXEL * sizeof(int16_t), spare = (size_t)side * 3 + 16;
    const filter_t *down = find_filter(s, box->high, side, NULL);
    const filter_t *across = down ? find_filter(s, box->wide, side, down) : NULL;
    if (!across || !grow((void **)&s->line, &s->line_cap, line + spare)) return NO_MEMORY;
    const uint8_t *corner = region + (size_t)(box->top - top) * stride + (size_t)(box->left - left) * PIXEL;
    for (int i = 0; i < side; i += ROWS) {
        const uint8_t *rows[ROWS];
        const int16_t *taps[ROWS];
        uint8_t *outs[ROWS];
        for (int r = 0; r < ROWS; r++) {
            int row = i + r < side ? i + r : side - 1;
            rows[r] = corner + (size_t)down->first[row] * stride;
            taps[r] = down->taps + (size_t)row * down->reach;
            outs[r] = i + r < side ? out + (size_t)row * side * 3 : (uint8_t *)s->line + line;
        }
        s->vertical(rows, stride, taps, down->reach, box->wide, s->line);
        s->horizontal(s->line, across, box->flip, outs);
    }
    return DONE;
}

/* ------------------------------------------------------------------------------------------------ decoding */

static void on_error(j_common_ptr jpeg) { longjmp(((scratch_t *)jpeg->client_data)->escape, 1); }

static void on_message(j_common_ptr jpeg, int level) {
    if (level < 0) jpeg->err->num_warnings++; /* libjpeg invents pixels and goes on: we do not */
}

static int prepare(scratch_t *s) {
    memset(s, 0, sizeof *s);
    s->jpeg.err = jpeg_std_error(&s->handler);
    s->handler.error_exit = on_error;
    s->handler.emit_message = on_message;
    if (setjmp(s->escape)) return 0;
    s->jpeg.client_data = s;
    jpeg_create_decompress(&s->jpeg);
    return 1;
}

/* How every picture is decoded. */
static void read_header(struct jpeg_decompress_struct *jpeg, const uint8_t *data, uint64_t size) {
    jpeg_mem_src(jpeg, data, size);
    jpeg_read_header(jpeg, TRUE);
    jpeg->out_color_space = JCS_EXT_RGBX;
    jpeg->dct_method = JDCT_ISLOW;
    jpeg->do_fancy_upsampling = TRUE;
}

/* Where the views of a picture look, and from where on pixels[] holds it: `columns` of each row from (top, left). */
typedef struct {
    int top, left, bottom, right;
    size_t columns;
} region_t;

/* The smallest region that holds all boxes; 0 where one is not inside the picture. */
static int enclose(region_t *r, const sample_t *sample, int views, const box_t *boxes) {
    *r = (region_t){INT_MAX, INT_MAX, 0, 0, 0};
    for (const box_t *b = boxes; b < boxes + views; b++) {
        if (b->top < 0 || b->left < 0 || b->high < 1 || b->wide < 1 || b->top + b->high > sample->height ||
            b->left + b->wide > sample->width)
            return 0;
        if (b->top < r->top) r->top = b->top;
        if (b->left < r->left) r->left = b->left;
        if (b->top + b->high > r->bottom) r->bottom = b->top + b->high;
        if (b->left + b->wide > r->right) r->right = b->left + b->wide;
    }
    return 1;
}

/* The region of a JPEG, a little wider than asked for. */
static int decode_region(scratch_t *s, const uint8_t *data, const sample_t *sample, region_t *r) {
    int height = sample->height, width = sample->width;
    /* Smooth chroma upsampling looks at the neighbour: without a margin the region's edges would differ. */
    r->top = r->top > MARGIN ? r->top - MARGIN : 0, r->left = r->left > MARGIN ? r->left - MARGIN : 0;
    r->bottom = r->bottom + MARGIN < height ? r->bottom + MARGIN : height;
    r->right = r->right + MARGIN < width ? r->right + MARGIN : width;

    struct jpeg_decompress_struct *jpeg = &s->jpeg;
    if (setjmp(s->escape)) {
        jpeg_abort_decompress(jpeg);
        return DAMAGED;
    }
    read_header(jpeg, data, sample->size);
    if ((int)jpeg->image_height != height || (int)jpeg->image_width != width) {
        jpeg_abort_decompress(jpeg);
        return OTHER_PICTURE;
    }
    jpeg_start_decompress(jpeg);
    JDIMENSION from = r->left, columns = r->right - r->left;
    if ((int)columns < width) jpeg_crop_scanline(jpeg, &from, &columns);
    r->left = (int)from, r->columns = columns;
    size_t stride = r->columns * PIXEL;
    if (!grow((void **)&s->pixels, &s->pixels_cap, stride * (r->bottom - r->top) + 64)) {
        jpeg_abort_decompress(jpeg);
        return NO_MEMORY;
    }
    if (r->top) jpeg_skip_scanlines(jpeg, r->top);
    for (int row = r->top; row < r->bottom;) {
        JSAMPROW lines[16];
        int count = 0;
        for (; count < 16 && row + count < r->bottom; count++)
            lines[count] = s->pixels + stride * (row + count - r->top);
        int got = (int)jpeg_read_scanlines(jpeg, lines, count);
        if (!got) longjmp(s->escape, 1);
        row += got;
    }
    long warnings = s->handler.num_warnings;
    jpeg_abort_decompress(jpeg); /* what lies below the boxes is never decoded */
    return warnings ? DAMAGED : DONE;
}

/* The region of a picture that is stored as pixels. */
static int copy_region(scratch_t *s, const uint8_t *data, const sample_t *sample, region_t *r) {
    if (sample->size != (uint64_t)3 * sample->height * sample->width) return OTHER_PICTURE;
    size_t last = (size_t)(r->right - r->left) - 1;
    r->columns = last + 1;
    if (!grow((void **)&s->pixels, &s->pixels_cap, r->columns * PIXEL * (r->bottom - r->top) + 64)) return NO_MEMORY;
    uint8_t *to = s->pixels;
    for (int row = r->top; row < r->bottom; row++, to += r->columns * PIXEL) {
        const uint8_t *from = data + ((size_t)row * sample->width + r->left) * 3;
        for (size_t x = 0; x < last; x++) memcpy(to + x * PIXEL, from + x * 3, PIXEL); /* X is anything */
        memcpy(to + last * PIXEL, from + last * 3, 3);
        to[last * PIXEL + 3] = 0;
    }
    return DONE;
}

/* All views of one picture, whose bytes are `data`. */
static int make_views(scratch_t *s, const uint8_t *data, const sample_t *sample, int views, const box_t *boxes,
                      const int32_t *sides, uint8_t *const *outs) {
    region_t region;
    if (!enclose(&region, sample, views, boxes)) return OTHER_PICTURE;
    int code = (sample->raw ? copy_region : decode_region)(s, data, sample, &region);
    s->stage = CUTTING;
    size_t stride = region.columns * PIXEL;
    for (int v = 0; code == DONE && v < views; v++)
        if (sides[v]) /* 0: decoded only, for the profiler */
            code = make_view(s, s->pixels, stride, region.top, region.left, boxes + v, sides[v], outs[v]);
    return code;
}

/* A whole JPEG at 1/denominator of its size, decoded row by row and kept nowhere: for the profiler, and for the
 * converter to see that nothing is wrong with it. */
static int decode_whole(scratch_t *s, const uint8_t *data, const sample_t *sample, int denominator) {
    struct jpeg_decompress_struct *jpeg = &s->jpeg;
    if (setjmp(s->escape)) {
        jpeg_abort_decompress(jpeg);
        return DAMAGED;
    }
    read_header(jpeg, data, sample->size);
    jpeg->scale_num = 1, jpeg->scale_denom = (unsigned)denominator;
    jpeg_start_decompress(jpeg);
    if (!grow((void **)&s->pixels, &s->pixels_cap, (size_t)jpeg->output_width * PIXEL + 64)) {
        jpeg_abort_decompress(jpeg);
        return NO_MEMORY;
    }
    JSAMPROW line = s->pixels;
    while (jpeg->output_scanline < jpeg->output_height)
        if (!jpeg_read_scanlines(jpeg, &line, 1)) longjmp(s->escape, 1);
    long warnings = s->handler.num_warnings;
    jpeg_finish_decompress(jpeg);
    return warnings ? DAMAGED : DONE;
}

/* ------------------------------------------------------------------------------------------------ reading */

/* The sum over 8-byte words of a mixed word times an odd number of its own, modulo 2^64: any change of one word shows,
 * several in one picture do with all but certainty, and numpy computes the same (pipeline/decoder.py). */
uint64_t checksum(const uint8_t *data, uint64_t size) {
    uint64_t sum = size, factor = 0x9E3779B97F4A7C15u, word;
    for (uint64_t at = 0; at < size; at += 8, factor += 0x9E3779B97F4A7C15u << 1) {
        if (size - at >= 8) memcpy(&word, data + at, 8);
        else word = 0, memcpy(&word, data + at, size - at);
        uint64_t mixed = (word ^ (word >> 32)) * factor;
        sum += mixed ^ (mixed >> 29);
    }
    return sum ? sum : 1;
}

static int read_and_make_views(scratch_t *s, const sample_t *sample, int views, const box_t *boxes,
                               const int32_t *sides, uint8_t *const *outs) {
    uint8_t *data = sample->data;
    s->stage = READING;
    if (sample->file >= 0) {
        if (!data) {
            if (!grow((void **)&s->bytes, &s->bytes_cap, sample->size)) return NO_MEMORY;
            data = s->bytes;
        }
        for (uint64_t got = 0; got < sample->size;) {
            ssize_t more = pread(sample->file, data + got, sample->size - got, (off_t)(sample->offset + got));
            if (more < 0 && errno == EINTR) continue;
            if (more <= 0) return UNREADABLE;
            got += (uint64_t)more;
        }
    }
    if (sample->sum && checksum(data, sample->size) != sample->sum) return CHANGED;
    if (!views) return DONE; /* read only */
    s->stage = DECODING;
    return make_views(s, data, sample, views, boxes, sides, outs);
}

/* ------------------------------------------------------------------------------------------------ a batch */

typedef struct {
    int count, views;
    sample_t *samples;    /* count */
    const box_t *boxes;   /* count x views */
    const int32_t *sides; /* views */
    uint8_t *const *outs; /* views, each (count, side, side, 3) */
    atomic_int next;
} batch_t;

typedef struct {
    batch_t *batch;
    scratch_t *scratch;
} worker_t;

static void *work(void *argument) {
    worker_t *worker = argument;
    batch_t *b = worker->batch;
    int i;
    while ((i = atomic_fetch_add(&b->next, 1)) < b->count) {
        uint8_t *outs[MOST_VIEWS];
        for (int v = 0; v < b->views; v++) outs[v] = b->outs[v] + (size_t)i * b->sides[v] * b->sides[v] * 3;
        worker->scratch->place = i;
        b->samples[i].status = read_and_make_views(worker->scratch, b->samples + i, b->views,
                                                   b->boxes + (size_t)i * b->views, b->sides, outs);
    }
    worker->scratch->stage = IDLE;
    return NULL;
}

typedef struct {
    int threads;
    scratch_t scratch[];
} crops_t;

void crops_close(crops_t *crops) {
    if (!crops) return;
    for (int t = 0; t < crops->threads; t++) release(crops->scratch + t);
    free(crops);
}

/* Memory for `threads` threads; NULL without memory. simd: 0 for the plain arithmetic, which gives the same pixels. */
crops_t *crops_open(int threads, int simd) {
    vertical_fn *vertical = vertical_plain;
    horizontal_fn *horizontal = horizontal_plain;
#ifdef HAVE_AVX2
    if (simd && __builtin_cpu_supports("avx2")) vertical = vertical_avx2, horizontal = horizontal_avx2;
#else
    (void)simd;
#endif
    crops_t *crops = calloc(1, sizeof(crops_t) + threads * sizeof(scratch_t));
    if (!crops) return NULL;
    for (; crops->threads < threads; crops->threads++) {
        scratch_t *s = crops->scratch + crops->threads;
        if (!prepare(s)) {
            crops_close(crops);
            return NULL;
        }
        s->vertical = vertical, s->horizontal = horizontal;
    }
    return crops;
}

/* What the first busy thread is at, and at which picture of the batch: asked from another thread meanwhile. */
int crops_doing(crops_t *crops, int *place) {
    for (int t = 0; t < crops->threads; t++) {
        int stage = crops->scratch[t].stage;
        *place = crops->scratch[t].place;
        if (stage != IDLE) return stage;
    }
    return IDLE;
}

/* Decode whole JPEGs that lie in memory, on one thread. Returns how many failed. */
int crops_whole(crops_t *crops, int count, int denominator, sample_t *samples) {
    int failed = 0;
    for (int i = 0; i < count; i++) {
        samples[i].status = decode_whole(crops->scratch, samples[i].data, samples + i, denominator);
        failed += samples[i].status != DONE;
    }
    return failed;
}

/* Make every view of a batch, at most MOST_VIEWS, on every thread. Returns how many pictures failed; their status says
 * why. */
int crops_batch(crops_t *crops, int count, int views, sample_t *samples, const box_t *boxes, const int32_t *sides,
                uint8_t *const *outs) {
    batch_t batch = {count, views, samples, boxes, sides, outs, 0};
    int threads = crops->threads < count ? crops->threads : count, started = 0, failed = 0;
    pthread_t handle[threads > 0 ? threads : 1];
    worker_t workers[threads > 0 ? threads : 1];
    for (int t = 0; t < threads; t++) workers[t] = (worker_t){&batch, crops->scratch + t};
    for (int t = 1; t < threads; t++, started++)
        if (pthread_create(handle + t, NULL, work, workers + t)) break; /* fewer threads are slower, not wrong */
    if (threads > 0) work(workers);
    for (int t = 1; t <= started; t++) pthread_join(handle[t], NULL);
    for (int i = 0; i < count; i++) failed += samples[i].status != DONE;
    return failed;
}
