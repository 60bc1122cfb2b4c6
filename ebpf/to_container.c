// SPDX-License-Identifier: Apache-2.0 OR MIT OR GPL-2.0-only
// What a container gets from the kernel's routes, where it leaves its sandbox: answers of backends come
// from the service. Everything else goes on as it is.
#include "answer.h"
#include "icmp.h"
#include "of_network.h"
#include "report.h"

// Shows the packet that an error is about, as its sender has sent it, in place of the error; gives whether it did.
SEPARATE int report_refused(struct __sk_buff *skb, struct packet *error) {
    struct packet refused = {.tuple.network = network, .reason = REASON_ERROR};
    struct {
        __u8 type;
        __u8 code;
    } why;
    __be16 length;
    if (!error || bpf_skb_load_bytes(skb, error->transport, &why, sizeof why) ||
        !has_packet(error->ipv4, why.type))
        return 0;
    __u32 at = error->transport + ERROR_HEADER;
    __u32 length_at = error->ipv4 ? offsetof(struct iphdr, tot_len) : offsetof(struct ipv6hdr, payload_len);
    if (read_addresses(skb, &refused, bpf_htons(error->ipv4 ? ETH_P_IP : ETH_P_IPV6), at) ||
        bpf_skb_load_bytes(skb, at + length_at, &length, sizeof length))
        return 0;
    struct report *report = begin_report(skb, &refused, POINT_TO_CONTAINER, at);
    if (!report)
        return 0;
    // The error has the beginning of it only.
    report->length = bpf_ntohs(length) + (error->ipv4 ? 0 : sizeof(struct ipv6hdr));
    report->error_type = why.type;
    report->error_code = why.code;
    end_report(report, &refused, TC_ACT_SHOT);
    return 1;
}

SEC("classifier")
int netctl_to(struct __sk_buff *skb) {
    struct packet packet = {.tuple.network = network};
    if (read_addresses(skb, &packet, skb->protocol, ETH_HLEN))
        return PASS;
    struct report *report = begin_report(skb, &packet, POINT_TO_CONTAINER, ETH_HLEN);
    int verdict = PASS;
    if (is_error(&packet)) {
        verdict = translate_error(skb, &packet, 1);
        if (report && verdict == PASS && report_refused(skb, &packet))
            return PASS;
    } else if (translate_answer(skb, &packet)) {
        verdict = lost(&packet);
    }
    return end_report(report, &packet, verdict);
}

const char LICENSE[] SEC("license") = "Dual MIT/GPL";
