// SPDX-License-Identifier: Apache-2.0 OR MIT OR GPL-2.0-only
// What those see who watch: a part of all packets, and each that was not carried, with the reason. Where nobody
// watches it costs one look at a map of one value.
#pragma once
#include "packet.h"

// What is wanted; nothing where nobody watches.
static __always_inline const struct watching *wanted(void) {
    __u32 zero = 0;
    struct watching *wanted = bpf_map_lookup_elem(&watching, &zero);
    if (!wanted || !wanted->until || (__s64)(wanted->until - bpf_ktime_get_coarse_ns()) <= 0)
        return NULL;
    return wanted;
}

// Where a report is written before it is handed over.
static __always_inline struct report *blank(void) {
    __u32 zero = 0;
    struct scratch *scratch = bpf_map_lookup_elem(&scratches, &zero);
    return scratch ? &scratch->report : NULL;
}

// What goes its way takes half of the room at most: a flood of it hides nothing that was not carried.
static __always_inline void hand_over(const struct report *report) {
    if ((!report->reason && bpf_ringbuf_query(&reports, BPF_RB_AVAIL_DATA) > REPORT_BYTES / 2) ||
        bpf_ringbuf_output(&reports, (void *)report, sizeof *report, 0))
        note(EVENT_NOT_SHOWN);
}

// Notes a packet as it came, whose headers begin at `at`; whoever carries it changes it. Gives nothing where
// nobody watches.
static __always_inline struct report *
begin_report(struct __sk_buff *skb, struct packet *packet, __u8 point, __u32 at) {
    const struct watching *wants = wanted();
    struct report *report = wants ? blank() : NULL;
    if (!report || (wants->network && wants->network != packet->tuple.network))
        return NULL;
    // What has no ports is shown without.
    read_ports(skb, packet);
    report->time = bpf_ktime_get_ns();
    report->network = packet->tuple.network;
    report->length = skb->len - at;
    report->source = packet->tuple.source;
    report->destination = packet->tuple.destination;
    report->source_port = packet->tuple.source_port;
    report->destination_port = packet->tuple.destination_port;
    report->protocol = packet->tuple.protocol;
    report->tcp_flags = packet->tcp_flags;
    report->point = point;
    // Of TCP each packet that opens or ends a connection.
    bool is_end = packet->tcp_flags & (TCP_SYN | TCP_FIN | TCP_RST);
    packet->is_shown = wants->every && (is_end || bpf_get_prandom_u32() % wants->every == 0);
    report->error_type = 0;
    report->error_code = 0;
    report->zero = 0;
    return report;
}

// Notes what became of it, and hands the report over where it is wanted.
static __always_inline int end_report(struct report *report, const struct packet *packet, int verdict) {
    if (!report)
        return verdict;
    if (!packet->is_shown && !packet->reason)
        return verdict;
    report->reason = packet->reason;
    report->verdict = verdict == TC_ACT_SHOT ? VERDICT_DROPPED
                      : verdict == PASS      ? VERDICT_KERNEL
                                             : VERDICT_CARRIED;
    report->is_translated = packet->is_translated;
    report->translated = packet->translated;
    report->translated_port = packet->translated_port;
    hand_over(report);
    return verdict;
}
