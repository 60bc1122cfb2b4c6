// SPDX-License-Identifier: Apache-2.0 OR MIT OR GPL-2.0-only
// What a container gets from the kernel's routes, where it leaves its sandbox: answers of backends come
// from the service. Everything else goes on as it is.
#include "answer.h"
#include "icmp.h"
#include "of_network.h"

SEC("classifier")
int netctl_to(struct __sk_buff *skb) {
    struct packet packet = {.tuple.network = network};
    if (read_addresses(skb, &packet, skb->protocol, ETH_HLEN))
        return PASS;
    if (is_error(&packet))
        return translate_error(skb, &packet, 1);
    return translate_answer(skb, &packet) ? TC_ACT_SHOT : PASS;
}

const char LICENSE[] SEC("license") = "Dual MIT/GPL";
