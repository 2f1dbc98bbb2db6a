/* Every view of a JPEG from one decode of the region that the views need, a batch at a time.
 *
 *   file --(pread: a file cut short under us is an error, where a memory map would kill the process)--> JPEG
 *        --(libjpeg-turbo: only the rows and columns under the boxes)--> RGBX rows
 *        --(per view: vertical, then horizontal triangle filter, flip)--> (side, side, 3) uint8
 *
 * The filter is Pillow's antialiased bilinear on the crop: a triangle as wide as the reduction, cut off at the box.
 * All arithmetic is integer and the same in the plain and the AVX2 version, so a view is equal on every machine that
 * decodes equally: a product is (a * b + 2^14) >> 15, pixels have 7 fractional bits, weights 15. A view is within a
 * hundredth of a grey level of exact arithmetic before its last rounding.
 *
 * The accurate inverse DCT and the smooth chroma upsampling cost three percent and are worth ten decibels.
 */
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
enum { PIXEL = 4, LANES = 16, MARGIN = 2, MOST_VIEWS = 16 };

typedef struct {
    int32_t top, left, high, wide, flip; /* a view's box in the stored picture, and whether it is mirrored */
} box_t;

/* One picture: where its JPEG lies, what the store says of it, and how it went. */
typedef struct {
    const uint8_t *data;   /* the JPEG in memory, where file is -1 */
    uint64_t offset, size; /* in the file */
    uint64_t sum;          /* of the bytes, see checksum(); 0: not known */
    int32_t file, height, width, status;
} sample_t;

/* The filter of one axis: output i is the sum of taps[i * reach + k] * input[first[i] + k], k < reach. */
typedef struct {
    int length, side; /* what it was made for */
    int reach;        /* taps of each output, a multiple of 4; the last ones may be 0 */
    int32_t *first;
    int16_t *taps;
    int16_t *wide_taps; /* each tap four times: one for each byte of an RGBX pixel */
    size_t side_cap, tap_cap;
} filter_t;

typedef struct {
    struct jpeg_decompress_struct jpeg;
    struct jpeg_error_mgr handler;
    jmp_buf escape;
    uint8_t *bytes; /* a JPEG as read from its file */
    size_t bytes_cap;
    uint8_t *pixels; /* the decoded region, RGBX */
    size_t pixels_cap;
    int16_t *line; /* one output row before the horizontal filter */
    size_t line_cap;
    filter_t down, across;
    atomic_int stage, place; /* and at which picture of the batch */
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
    for (filter_t *f = &s->down;; f = &s->across) {
        free(f->first), free(f->taps), free(f->wide_taps);
        if (f == &s->across) break;
    }
}

/* ------------------------------------------------------------------------------------------------ filters */

/* Pillow's precompute_coeffs for BILINEAR, in 15-bit fixed point with an exact sum. */
static int make_filter(filter_t *f, int length, int side) {
    if (f->length == length && f->side == side) return 1;
    double scale = (double)length / side, support = scale < 1 ? 1 : scale;
    int most = (int)ceil(support) * 2 + 1;
    if (most > length) most = length;
    int reach = (most + 3) / 4 * 4;
    size_t taps = (size_t)side * reach * sizeof(int16_t), ignored = f->side_cap, same = f->tap_cap, four = f->tap_cap * 4;
    f->length = f->side = 0;
    if (!grow((void **)&f->first, &ignored, side * sizeof(int32_t)) || !grow((void **)&f->taps, &same, taps) ||
        !grow((void **)&f->wide_taps, &four, taps * 4)) {
        f->side_cap = f->tap_cap = 0;
        return 0;
    }
    f->side_cap = ignored, f->tap_cap = same;
    memset(f->taps, 0, taps);
    for (int i = 0; i < side; i++) {
        double centre = (i + 0.5) * scale, weight[INT8_MAX * 2], sum = 0;
        int low = (int)(centre - support + 0.5), high = (int)(centre + support + 0.5);
        if (low < 0) low = 0;
        if (high > length) high = length;
        int count = high - low, best = 0, total = 0;
        double *w = count <= INT8_MAX * 2 ? weight : malloc(count * sizeof(double));
        if (!w) return 0;
        for (int k = 0; k < count; k++) {
            w[k] = 1 - fabs(low + k + 0.5 - centre) / support;
            if (w[k] < 0) w[k] = 0;
            sum += w[k];
            if (w[k] > w[best]) best = k;
        }
        int16_t *tap = f->taps + (size_t)i * reach;
        int fixed_best = 0;
        for (int k = 0; k < count; k++) {
            int fixed = (int)lrint(w[k] / sum * 32768);
            total += fixed;
            if (k == best) fixed_best = fixed;
            else tap[k] = (int16_t)fixed;
        }
        fixed_best += 32768 - total;
        tap[best] = (int16_t)(fixed_best > 32767 ? 32767 : fixed_best); /* 1 is not to be had: 255 stays 255 */
        f->first[i] = low;
        if (w != weight) free(w);
    }
    for (size_t k = 0; k < (size_t)side * reach; k++)
        for (int c = 0; c < PIXEL; c++) f->wide_taps[k * PIXEL + c] = f->taps[k];
    f->length = length, f->side = side, f->reach = reach;
    return 1;
}

static inline int16_t product(int16_t a, int16_t b) { return (int16_t)((a * b + 16384) >> 15); }

/* One output row of all columns: `rows` points at the first tap's row. */
static void vertical_plain(const uint8_t *rows, size_t stride, const int16_t *taps, int reach, int bytes, int16_t *line) {
    memset(line, 0, bytes * sizeof(int16_t));
    for (int k = 0; k < reach; k++)
        if (taps[k])
            for (int x = 0; x < bytes; x++) line[x] += product((int16_t)(rows[k * stride + x] << 7), taps[k]);
}

/* One output row as RGB bytes, mirrored where asked. */
static void horizontal_plain(const int16_t *line, const filter_t *f, int flip, uint8_t *out) {
    for (int i = 0; i < f->side; i++) {
        int from = flip ? f->side - 1 - i : i;
        const int16_t *pixel = line + (size_t)f->first[from] * PIXEL, *tap = f->taps + (size_t)from * f->reach;
        for (int c = 0; c < 3; c++) {
            int16_t sum = 0;
            for (int k = 0; k < f->reach; k++)
                if (tap[k]) sum += product(pixel[k * PIXEL + c], tap[k]);
            *out++ = (uint8_t)((sum + 64) >> 7);
        }
    }
}

#ifdef HAVE_AVX2
#define AVX2 __attribute__((target("avx2")))

AVX2 static void vertical_avx2(const uint8_t *rows, size_t stride, const int16_t *taps, int reach, int bytes,
                               int16_t *line) {
    while (reach > 1 && !taps[reach - 1]) reach--;
    for (int x = 0; x < bytes; x += LANES) { /* the rows end in room to read and the line in room to write */
        const uint8_t *from = rows + x;
        __m256i sum = _mm256_setzero_si256();
        for (int k = 0; k < reach; k++, from += stride) {
            __m256i pixel = _mm256_slli_epi16(_mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i *)from)), 7);
            sum = _mm256_add_epi16(sum, _mm256_mulhrs_epi16(pixel, _mm256_set1_epi16(taps[k])));
        }
        _mm256_store_si256((__m256i *)(line + x), sum);
    }
}

/* The same for up to three taps, which is what nearly every crop has, without a loop over them. */
AVX2 static void vertical_three_avx2(const uint8_t *rows, size_t stride, const int16_t *taps, int bytes,
                                     int16_t *line) {
    const __m256i one = _mm256_set1_epi16(taps[0]), two = _mm256_set1_epi16(taps[1]), three = _mm256_set1_epi16(taps[2]);
    /* A tap of 0 may lie below the last row that there is: read the first instead. */
    const uint8_t *second = taps[1] ? rows + stride : rows, *third = taps[2] ? rows + 2 * stride : rows;
    for (int x = 0; x < bytes; x += LANES) {
        __m256i a = _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i *)(rows + x)));
        __m256i b = _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i *)(second + x)));
        __m256i c = _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i *)(third + x)));
        a = _mm256_mulhrs_epi16(_mm256_slli_epi16(a, 7), one);
        b = _mm256_mulhrs_epi16(_mm256_slli_epi16(b, 7), two);
        c = _mm256_mulhrs_epi16(_mm256_slli_epi16(c, 7), three);
        _mm256_store_si256((__m256i *)(line + x), _mm256_add_epi16(_mm256_add_epi16(a, b), c));
    }
}

AVX2 static void vertical_any_avx2(const uint8_t *rows, size_t stride, const int16_t *taps, int reach, int bytes,
                                   int16_t *line) {
    if (reach == 4 && !taps[3]) vertical_three_avx2(rows, stride, taps, bytes, line);
    else vertical_avx2(rows, stride, taps, reach, bytes, line);
}

/* Sums of the even and of the odd taps of an output pixel, as (RGBX, RGBX). */
AVX2 static inline __m128i halves(const int16_t *line, const filter_t *f, int i) {
    const int16_t *pixel = line + (size_t)f->first[i] * PIXEL;
    const int16_t *tap = f->wide_taps + (size_t)i * f->reach * PIXEL;
    __m256i sum = _mm256_mulhrs_epi16(_mm256_loadu_si256((const __m256i *)pixel),
                                      _mm256_load_si256((const __m256i *)tap));
    for (int k = LANES; k < f->reach * PIXEL; k += LANES)
        sum = _mm256_add_epi16(sum, _mm256_mulhrs_epi16(_mm256_loadu_si256((const __m256i *)(pixel + k)),
                                                        _mm256_load_si256((const __m256i *)(tap + k))));
    return _mm_add_epi16(_mm256_castsi256_si128(sum), _mm256_extracti128_si256(sum, 1));
}

/* Two output pixels as 16-bit RGBX, rounded to whole grey levels. */
AVX2 static inline __m128i pair(const int16_t *line, const filter_t *f, int i, int j) {
    __m128i one = halves(line, f, i), other = halves(line, f, j);
    __m128i sum = _mm_add_epi16(_mm_unpacklo_epi64(one, other), _mm_unpackhi_epi64(one, other));
    return _mm_srai_epi16(_mm_add_epi16(sum, _mm_set1_epi16(64)), 7);
}

AVX2 static void horizontal_avx2(const int16_t *line, const filter_t *f, int flip, uint8_t *out) {
    const __m128i to_rgb = _mm_setr_epi8(0, 1, 2, 4, 5, 6, 8, 9, 10, 12, 13, 14, -1, -1, -1, -1);
    int side = f->side, step = flip ? -1 : 1, i = flip ? side - 1 : 0, done = 0;
    for (; done + 4 <= side; done += 4, i += 4 * step, out += 12) {
        __m128i four = _mm_packus_epi16(pair(line, f, i, i + step), pair(line, f, i + 2 * step, i + 3 * step));
        four = _mm_shuffle_epi8(four, to_rgb);
        if (done + 6 <= side) {
            _mm_storeu_si128((__m128i *)out, four); /* the last four bytes are written again */
        } else {
            uint8_t bytes[16];
            _mm_storeu_si128((__m128i *)bytes, four);
            memcpy(out, bytes, 12);
        }
    }
    for (; done < side; done++, i += step, out += 3) {
        __m128i one = pair(line, f, i, i);
        uint32_t bytes = (uint32_t)_mm_cvtsi128_si32(_mm_packus_epi16(one, one));
        memcpy(out, &bytes, 3);
    }
}
#endif

typedef void vertical_fn(const uint8_t *, size_t, const int16_t *, int, int, int16_t *);
typedef void horizontal_fn(const int16_t *, const filter_t *, int, uint8_t *);
static vertical_fn *vertical = vertical_plain;
static horizontal_fn *horizontal = horizontal_plain;

/* One view from a region of RGBX rows whose first pixel is (top, left) of the picture. */
static int make_view(scratch_t *s, const uint8_t *region, size_t stride, int top, int left, const box_t *box, int side,
                     uint8_t *out) {
    int bytes = box->wide * PIXEL;
    /* Taps of 0 behind the box read up to three pixels past the line. */
    size_t line = ((size_t)bytes + 2 * LANES + LANES) * sizeof(int16_t);
    size_t old = s->line_cap;
    if (!make_filter(&s->down, box->high, side) || !make_filter(&s->across, box->wide, side) ||
        !grow((void **)&s->line, &s->line_cap, line))
        return NO_MEMORY;
    if (s->line_cap != old) memset(s->line, 0, s->line_cap);
    const uint8_t *corner = region + (size_t)(box->top - top) * stride + (size_t)(box->left - left) * PIXEL;
    for (int i = 0; i < side; i++) {
        const uint8_t *rows = corner + (size_t)s->down.first[i] * stride;
        vertical(rows, stride, s->down.taps + (size_t)i * s->down.reach, s->down.reach, bytes, s->line);
        horizontal(s->line, &s->across, box->flip, out + (size_t)i * side * 3);
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

/* All views of one picture, whose JPEG is `data`. */
static int make_views(scratch_t *s, const uint8_t *data, const sample_t *sample, int views, const box_t *boxes,
                      const int32_t *sides, uint8_t *const *outs) {
    int height = sample->height, width = sample->width;
    int top = INT_MAX, left = INT_MAX, bottom = 0, right = 0;
    for (int v = 0; v < views; v++) {
        const box_t *b = boxes + v;
        if (b->top < 0 || b->left < 0 || b->high < 1 || b->wide < 1 || b->top + b->high > height ||
            b->left + b->wide > width)
            return OTHER_PICTURE;
        if (b->top < top) top = b->top;
        if (b->left < left) left = b->left;
        if (b->top + b->high > bottom) bottom = b->top + b->high;
        if (b->left + b->wide > right) right = b->left + b->wide;
    }
    /* Smooth chroma upsampling looks at the neighbour: without a margin the region's edges would differ. */
    top = top > MARGIN ? top - MARGIN : 0, left = left > MARGIN ? left - MARGIN : 0;
    bottom = bottom + MARGIN < height ? bottom + MARGIN : height;
    right = right + MARGIN < width ? right + MARGIN : width;

    struct jpeg_decompress_struct *jpeg = &s->jpeg;
    if (setjmp(s->escape)) {
        jpeg_abort_decompress(jpeg);
        return DAMAGED;
    }
    jpeg_mem_src(jpeg, data, sample->size);
    jpeg_read_header(jpeg, TRUE);
    if ((int)jpeg->image_height != height || (int)jpeg->image_width != width) {
        jpeg_abort_decompress(jpeg);
        return OTHER_PICTURE;
    }
    jpeg->out_color_space = JCS_EXT_RGBX;
    jpeg->dct_method = JDCT_ISLOW;
    jpeg->do_fancy_upsampling = TRUE;
    jpeg_start_decompress(jpeg);
    JDIMENSION from = left, columns = right - left;
    if ((int)columns < width) jpeg_crop_scanline(jpeg, &from, &columns);
    size_t stride = (size_t)columns * PIXEL;
    if (!grow((void **)&s->pixels, &s->pixels_cap, stride * (bottom - top) + 64)) {
        jpeg_abort_decompress(jpeg);
        return NO_MEMORY;
    }
    if (top) jpeg_skip_scanlines(jpeg, top);
    for (int row = top; row < bottom;) {
        JSAMPROW lines[16];
        int count = 0;
        for (; count < 16 && row + count < bottom; count++) lines[count] = s->pixels + stride * (row + count - top);
        int got = (int)jpeg_read_scanlines(jpeg, lines, count);
        if (!got) longjmp(s->escape, 1);
        row += got;
    }
    long warnings = s->handler.num_warnings;
    jpeg_abort_decompress(jpeg); /* what lies below the boxes is never decoded */
    if (warnings) return DAMAGED;
    s->stage = CUTTING;
    for (int v = 0; v < views; v++) {
        if (!sides[v]) continue; /* decoded only: for the profiler */
        int code = make_view(s, s->pixels, stride, top, (int)from, boxes + v, sides[v], outs[v]);
        if (code) return code;
    }
    return DONE;
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
    const uint8_t *data = sample->data;
    s->stage = READING;
    if (sample->file >= 0) {
        if (!grow((void **)&s->bytes, &s->bytes_cap, sample->size)) return NO_MEMORY;
        for (uint64_t got = 0; got < sample->size;) {
            ssize_t more = pread(sample->file, s->bytes + got, sample->size - got, (off_t)(sample->offset + got));
            if (more <= 0) return UNREADABLE;
            got += (uint64_t)more;
        }
        data = s->bytes;
    }
    if (sample->sum && checksum(data, sample->size) != sample->sum) return CHANGED;
    if (!views) return DONE; /* read only: for the profiler */
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
    atomic_int busy;
    int threads;
    scratch_t scratch[];
} crops_t;

void crops_close(crops_t *crops) {
    if (!crops || crops->busy) return; /* a read that hangs may come back yet: what it writes to is left to it */
    for (int t = 0; t < crops->threads; t++) release(crops->scratch + t);
    free(crops);
}

/* Memory for `threads` threads; NULL without memory. simd: 0 for the plain arithmetic, which gives the same pixels. */
crops_t *crops_open(int threads, int simd) {
#ifdef HAVE_AVX2
    int can = simd && __builtin_cpu_supports("avx2");
    vertical = can ? vertical_any_avx2 : vertical_plain;
    horizontal = can ? horizontal_avx2 : horizontal_plain;
#else
    (void)simd;
#endif
    crops_t *crops = calloc(1, sizeof(crops_t) + threads * sizeof(scratch_t));
    if (!crops) return NULL;
    for (; crops->threads < threads; crops->threads++)
        if (!prepare(crops->scratch + crops->threads)) {
            crops_close(crops);
            return NULL;
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

/* Make every view of a batch on every thread. Returns how many pictures failed; their status says why. */
int crops_batch(crops_t *crops, int count, int views, sample_t *samples, const box_t *boxes, const int32_t *sides,
                uint8_t *const *outs) {
    batch_t batch = {count, views, samples, boxes, sides, outs, 0};
    int threads = crops->threads < count ? crops->threads : count, started = 0, failed = 0;
    if (views > MOST_VIEWS) return -1;
    crops->busy = 1;
    pthread_t handle[threads > 0 ? threads : 1];
    worker_t workers[threads > 0 ? threads : 1];
    for (int t = 0; t < threads; t++) workers[t] = (worker_t){&batch, crops->scratch + t};
    for (int t = 1; t < threads; t++, started++)
        if (pthread_create(handle + t, NULL, work, workers + t)) break; /* fewer threads are slower, not wrong */
    if (threads > 0) work(workers);
    for (int t = 1; t <= started; t++) pthread_join(handle[t], NULL);
    for (int i = 0; i < count; i++) failed += samples[i].status != DONE;
    crops->busy = 0;
    return failed;
}
