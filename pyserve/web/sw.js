// llama.cpp's web UI leaves a service worker in the browser, which goes on showing that page to who
// comes to this address later. The browser asks for its script again, and gets this one: it leaves.
self.addEventListener("install", () => self.skipWaiting());

self.addEventListener("activate", (event) => event.waitUntil(leave()));

async function leave() {
  await self.registration.unregister();
  for (const name of await caches.keys()) {
    if (name.startsWith("workbox-") || name === "api-cache") await caches.delete(name);
  }
  for (const tab of await self.clients.matchAll({ type: "window" })) await tab.navigate(tab.url);
}
