/* Shares work among the threads of the OpenMP runtime that the process has, by entry points that are handed in: those of
 * a second runtime would spin beside the first one's. And among threads of its own, where work is long enough. */

#include <pthread.h>
#include <stdlib.h>

typedef int (*Work)(const void *job, long start, long stop); /* 0, or 1 where memory is short */

typedef struct {
    void (*parallel)(void (*member)(void *), void *data, unsigned threads, unsigned flags);
    int (*number)(void), (*threads)(void); /* of the calling thread; how many there are */
} Runtime;

typedef struct {
    Runtime runtime;
    Work work;
    const void *job;
    long count, parts;
    int failed;
} Team;

static void member(void *data) {
    Team *team = data;
    for (long i = team->runtime.number(); i < team->parts; i += team->runtime.threads())
        if (team->work(team->job, team->count * i / team->parts, team->count * (i + 1) / team->parts))
            __atomic_store_n(&team->failed, 1, __ATOMIC_RELAXED);
}

/* Calls `work` for `parts` ranges that make up the first `count` numbers, side by side; 1 if any of them gave 1. */
int share(Runtime runtime, Work work, const void *job, long count, long parts) {
    Team team = {runtime, work, job, count, parts, 0};
    runtime.parallel(member, &team, (unsigned)parts, 0);
    return team.failed;
}

typedef struct {
    Work work;
    const void *job;
    long start, stop;
    int failed, begun;
    pthread_t thread;
} Part;

static void *run(void *data) {
    Part *part = data;
    part->failed = part->work(part->job, part->start, part->stop);
    return NULL;
}

/* The same by threads that are made for it, and sleep where they wait; what cannot be started is done by the caller. */
int apart(Work work, const void *job, long count, long parts) {
    Part *all = calloc(parts, sizeof(Part));
    int failed = 0;
    if (!all) return 1;
    for (long i = parts - 1; i >= 0; i--) {
        all[i] = (Part){work, job, count * i / parts, count * (i + 1) / parts, 0, 0, 0};
        if (i) all[i].begun = !pthread_create(&all[i].thread, NULL, run, all + i);
        if (!all[i].begun) run(all + i);
    }
    for (long i = 0; i < parts; i++) {
        if (all[i].begun) pthread_join(all[i].thread, NULL);
        failed |= all[i].failed;
    }
    free(all);
    return failed;
}
