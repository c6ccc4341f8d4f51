// The status line.

export class StatusLine {
  #counting = 0;

  /** @param {(id: string) => HTMLElement} $ */
  constructor($) {
    this.$ = $;
  }

  say(words, state) {
    this.$("status-line").dataset.state = state;
    document.body.dataset.state = state;
    if (this.$("status").textContent !== words) this.$("status").textContent = words;
  }

  /** The seconds until something, for the eye only: a screen reader hears the status once. */
  countDown(ms) {
    clearInterval(this.#counting);
    const end = Date.now() + ms;
    const show = () => {
      const seconds = Math.ceil((end - Date.now()) / 1000);
      this.$("countdown").textContent = seconds > 0 ? `in ${seconds} s` : "";
      if (seconds <= 0) clearInterval(this.#counting);
    };
    this.#counting = setInterval(show, 250);
    show();
  }
}
